//! Fetches from a local hub: requests, errors, and the state of the cache.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use diffuse_hub::{
    FetchOptions, HubError, Listing, Refusal, Selection, Snapshot, Wanted, fetch, resolve,
};
use diffuse_testing::hub::{Behaviour, HubServer};
use diffuse_testing::reference;

const SD: &str = "someone/stable-diffusion";
const CAT: &str = "someone/ddpm-cat";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
/// The large file of [`CAT`].
const ROOT_UNET: &str = "diffusion_pytorch_model.safetensors";

/// The wanted files of the tests' repositories.
struct Files;

impl Files {
    const CAT: [&str; 3] = ["config.json", "scheduler_config.json", ROOT_UNET];
    const SD: [&str; 5] = [
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        UNET,
        "vae/diffusion_pytorch_model.safetensors",
    ];
    const OPTIONAL: &str = "tokenizer/special_tokens_map.json";
}

impl Wanted for Files {
    fn first(&self) -> Option<&str> {
        Some("model_index.json")
    }

    fn select(&self, folder: &Path, listing: &Listing) -> Result<Selection, Refusal> {
        let index = fs::read_to_string(folder.join("model_index.json")).expect("the first file");
        let names = if index.contains("DDPMPipeline") {
            &Self::CAT[..]
        } else if index.contains("StableDiffusionPipeline") {
            &Self::SD
        } else {
            return Err(Refusal::Unfit("it is neither a cat nor a boat".into()));
        };
        let mut selection = names.select(folder, listing)?;
        selection.files.insert(0, "model_index.json".into());
        if names.len() == Self::SD.len() {
            let optional = Self::OPTIONAL.to_string();
            match listing.has(&optional) {
                true => selection.files.push(optional),
                false => selection.absent.push(optional),
            }
        }
        Ok(selection)
    }
}

/// A hub with the tests' checkpoints and an empty cache.
struct World {
    hub: HubServer,
    cache: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let hub = HubServer::start();
        hub.publish(SD, reference().join("sd/base"));
        hub.publish(CAT, reference().join("ddpm/cat"));
        // Not wanted.
        hub.publish_file(SD, "v1-5-pruned.ckpt", "not wanted");
        Self {
            hub,
            cache: tempfile::tempdir().unwrap(),
        }
    }

    fn options(&self) -> FetchOptions {
        FetchOptions {
            endpoint: Some(self.hub.endpoint()),
            cache: Some(self.cache.path().into()),
            retries: 0,
            ..FetchOptions::default()
        }
    }

    fn fetch(&self, id: &str) -> Result<Snapshot, HubError> {
        fetch(id, &Files, &self.options(), |_| ControlFlow::Continue(()))
    }

    /// Sorted names of the files whose contents were requested since the last call.
    fn fetched(&self) -> Vec<String> {
        let requests = self.hub.requests().into_iter();
        let contents = requests.filter(|request| request.from.is_some());
        let mut files: Vec<String> = contents.map(|request| request.file).collect();
        files.sort();
        files.dedup();
        files
    }

    fn blob(&self, id: &str, file: &str) -> PathBuf {
        let folder = format!("models--{}/blobs", id.replace('/', "--"));
        self.cache.path().join(folder).join(self.hub.etag(id, file))
    }

    fn incomplete(&self, id: &str, file: &str) -> PathBuf {
        let mut name = self.blob(id, file).into_os_string();
        name.push(".incomplete");
        name.into()
    }

    /// Checks the cache: blobs are complete, and snapshots have no broken links.
    fn check_cache(&self, id: &str) {
        let folder = self
            .cache
            .path()
            .join(format!("models--{}", id.replace('/', "--")));
        let Ok(commits) = fs::read_dir(folder.join("snapshots")) else {
            return;
        };
        for commit in commits {
            for path in files_below(&commit.unwrap().path()) {
                let name = path.strip_prefix(folder.join("snapshots")).unwrap();
                let name = name.iter().skip(1).collect::<PathBuf>();
                let blob = self.blob(id, name.to_str().unwrap());
                assert_eq!(
                    fs::canonicalize(&path).unwrap(),
                    fs::canonicalize(blob).unwrap()
                );
            }
        }
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// The message that a user reads.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[test]
fn cache_is_laid_out_as_the_python_client_has_it() {
    let world = World::new();
    let snapshot = world.fetch(CAT).unwrap();
    let folder = world.cache.path().join("models--someone--ddpm-cat");
    assert_eq!(
        fs::read_to_string(folder.join("refs/main")).unwrap(),
        snapshot.commit
    );
    assert_eq!(
        snapshot.folder,
        folder.join("snapshots").join(&snapshot.commit)
    );
    assert!(world.blob(CAT, ROOT_UNET).is_file());
    #[cfg(unix)]
    {
        let link = fs::read_link(snapshot.folder.join("config.json")).unwrap();
        assert_eq!(
            link,
            Path::new("../../blobs").join(world.hub.etag(CAT, "config.json"))
        );
    }
    let mut blobs: Vec<_> = files_below(&folder.join("blobs"));
    blobs.retain(|path| path.extension().is_some());
    assert_eq!(blobs, Vec::<PathBuf>::new(), "nothing is left behind");
}

#[test]
fn any_file_at_any_depth() {
    let world = World::new();
    let files = ["a/b/c d#e.json", "a/b/large file.bin", "top"];
    for file in files {
        world.hub.publish_file(CAT, file, file);
    }
    let snapshot = fetch(CAT, &files[..], &world.options(), |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(snapshot.files, files);
    for file in files {
        assert_eq!(
            fs::read_to_string(snapshot.folder.join(file)).unwrap(),
            file
        );
    }
    world.check_cache(CAT);
    world.hub.requests();
    assert_eq!(
        resolve(CAT, &files[..], &world.options()).unwrap(),
        snapshot.folder
    );
    assert!(world.hub.requests().is_empty());
}

#[test]
fn files_that_would_leave_the_cache_are_not_fetched() {
    let world = World::new();
    world.hub.publish_file(CAT, "../../evil", "outside");
    let wanted = ["../../evil"];
    let error = resolve(CAT, &wanted[..], &world.options()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("`{CAT}` has no file `../../evil` in revision `main`")
    );
    assert!(
        !world
            .cache
            .path()
            .join("models--someone--ddpm-cat/evil")
            .exists()
    );
}

#[test]
fn copies_in_place_of_links() {
    let world = World::new();
    let options = FetchOptions {
        no_links: true,
        ..world.options()
    };
    let folder = resolve(CAT, &Files, &options).unwrap();
    for file in Files::CAT {
        let path = folder.join(file);
        assert!(fs::symlink_metadata(&path).unwrap().is_file(), "{file}");
        fs::write(&path, "edited").unwrap();
        let published = fs::read(reference().join("ddpm/cat").join(file)).unwrap();
        assert_eq!(
            fs::read(world.blob(CAT, file)).unwrap(),
            published,
            "{file}"
        );
    }
}

#[test]
fn works_without_a_hub_from_the_cache() {
    let world = World::new();
    let first = world.fetch(SD).unwrap();
    world.hub.requests();
    let again = world.fetch(SD).unwrap();
    assert_eq!(again.folder, first.folder);
    assert!(
        world.hub.requests().is_empty(),
        "the hub is not asked at all"
    );

    let offline = FetchOptions {
        offline: true,
        ..world.options()
    };
    assert_eq!(resolve(SD, &Files, &offline).unwrap(), first.folder);
    let by_commit = FetchOptions {
        revision: Some(first.commit.clone()),
        ..offline.clone()
    };
    assert_eq!(resolve(SD, &Files, &by_commit).unwrap(), first.folder);
    let nobody = FetchOptions {
        endpoint: Some("http://127.0.0.1:9".into()),
        update: true,
        ..world.options()
    };
    assert_eq!(
        resolve(SD, &Files, &nobody).unwrap(),
        first.folder,
        "a hub that cannot be reached"
    );

    let other = FetchOptions {
        revision: Some("other".into()),
        ..offline.clone()
    };
    for (id, options, revision) in [(SD, &other, "other"), (CAT, &offline, "main")] {
        let folder = format!("models--{}", id.replace('/', "--"));
        let cache = world.cache.path().join(folder);
        assert_eq!(
            resolve(id, &Files, options).unwrap_err().to_string(),
            format!(
                "`{id}` (revision `{revision}`) is not in the cache `{}`, and the program works \
                 offline: unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` to fetch it",
                cache.display()
            )
        );
    }
    assert!(world.hub.requests().is_empty());
}

#[test]
fn file_that_is_missing_in_the_cache_is_fetched_or_named() {
    let world = World::new();
    let snapshot = world.fetch(SD).unwrap();
    let offline = FetchOptions {
        offline: true,
        ..world.options()
    };
    let check = |file: &str| {
        let cache = world.cache.path().join("models--someone--stable-diffusion");
        assert_eq!(
            resolve(SD, &Files, &offline).unwrap_err().to_string(),
            format!(
                "`{file}` of `{SD}` (revision `main`) is not in the cache `{}`, and the program \
                 works offline: unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` to fetch it",
                cache.display()
            )
        );
        world.fetched();
        assert_eq!(world.fetch(SD).unwrap().folder, snapshot.folder);
        world.check_cache(SD);
    };
    for file in ["model_index.json", "unet/config.json"] {
        fs::remove_file(snapshot.folder.join(file)).unwrap();
        check(file);
        assert!(world.fetched().is_empty(), "its contents are there");
    }
    // A link without contents.
    fs::remove_file(world.blob(SD, UNET)).unwrap();
    check(UNET);
    assert_eq!(world.fetched(), [UNET]);
}

#[test]
fn files_that_a_repository_does_not_have_are_asked_for_once() {
    let world = World::new();
    world.hub.remove_file(SD, Files::OPTIONAL);
    world.fetch(SD).unwrap();
    world.hub.requests();
    world.fetch(SD).unwrap();
    assert!(world.hub.requests().is_empty());
}

#[test]
fn update_follows_the_revision_and_fetches_only_what_changed() {
    let world = World::new();
    let old = world.fetch(CAT).unwrap();
    world.fetched();
    world.hub.publish_file(CAT, "README.md", "more words");
    let config = fs::read_to_string(reference().join("ddpm/cat/config.json")).unwrap();
    world.hub.publish_file(CAT, "config.json", config + "\n");
    assert_eq!(world.fetch(CAT).unwrap().commit, old.commit);
    let update = FetchOptions {
        update: true,
        ..world.options()
    };
    let new = fetch(CAT, &Files, &update, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(world.fetched(), ["config.json"]);
    assert_ne!(new.commit, old.commit);
    assert!(old.folder.join(ROOT_UNET).is_file() && new.folder.join(ROOT_UNET).is_file());
    assert_eq!(world.fetch(CAT).unwrap().commit, new.commit);
}

#[test]
fn transfer_that_breaks_off_goes_on_by_itself() {
    let world = World::new();
    world.hub.behave(Behaviour {
        break_after: Some(100_000),
        breaks: 3,
        ..Behaviour::default()
    });
    let options = FetchOptions {
        retries: 1,
        ..world.options()
    };
    resolve(CAT, &Files, &options).unwrap();
    let requests = world.hub.requests().into_iter();
    let from: Vec<usize> = requests
        .filter(|request| request.file == ROOT_UNET)
        .filter_map(|request| request.from)
        .collect();
    // Each at the hub and, redirected, at the storage.
    let expected = [0, 0, 100_000, 100_000, 200_000, 200_000, 300_000, 300_000];
    assert_eq!(from, expected);
    world.check_cache(CAT);
}

#[test]
fn transfer_that_broke_off_goes_on_when_run_again() {
    let world = World::new();
    world.hub.behave(Behaviour {
        break_after: Some(123_456),
        breaks: 1,
        ..Behaviour::default()
    });
    let error = world.fetch(CAT).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the transfer of `{ROOT_UNET}` was interrupted at 123456 of 442172 bytes: run again to \
             continue"
        )
    );
    assert!(!world.blob(CAT, ROOT_UNET).exists());
    assert_eq!(
        fs::metadata(world.incomplete(CAT, ROOT_UNET))
            .unwrap()
            .len(),
        123_456
    );
    world.check_cache(CAT);
    // A revision refers to a complete snapshot.
    assert!(
        !world
            .cache
            .path()
            .join("models--someone--ddpm-cat/refs/main")
            .exists()
    );

    world.hub.requests();
    world.fetch(CAT).unwrap();
    let requests = world.hub.requests().into_iter();
    let from: Vec<usize> = requests.filter_map(|request| request.from).collect();
    assert_eq!(from, [123_456, 123_456]);
    assert!(!world.incomplete(CAT, ROOT_UNET).exists());
    world.check_cache(CAT);
}

#[test]
fn server_that_cannot_continue_sends_all_again() {
    let world = World::new();
    let broken = Behaviour {
        break_after: Some(100_000),
        breaks: 1,
        ..Behaviour::default()
    };
    world.hub.behave(broken.clone());
    world.fetch(CAT).unwrap_err();
    world.hub.behave(Behaviour {
        ignore_range: true,
        ..Behaviour::default()
    });
    world.fetch(CAT).unwrap();
    world.check_cache(CAT);
}

#[test]
fn left_over_that_is_too_long_or_whole() {
    let world = World::new();
    let incomplete = world.incomplete(CAT, ROOT_UNET);
    fs::create_dir_all(incomplete.parent().unwrap()).unwrap();
    fs::write(&incomplete, vec![7; 500_000]).unwrap();
    world.fetch(CAT).unwrap();
    world.check_cache(CAT);

    // Complete, but not renamed.
    fs::rename(world.blob(CAT, ROOT_UNET), &incomplete).unwrap();
    world.fetched();
    world.fetch(CAT).unwrap();
    assert_eq!(world.fetched(), Vec::<String>::new());
    world.check_cache(CAT);
}

/// The error of a file whose contents are not the hub's.
#[track_caller]
fn check_checksum(world: &World, error: &HubError, file: &str, digits: usize) {
    let HubError::Checksum { found, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(found.len(), digits);
    assert_eq!(
        error.to_string(),
        format!(
            "`{file}` was damaged in transfer and removed: its checksum is {found}, the hub's {}; \
             run again to fetch it",
            world.hub.etag(CAT, file)
        )
    );
}

#[test]
fn wrong_checksum_removes_the_file() {
    for (file, digits) in [(ROOT_UNET, 64), ("config.json", 40)] {
        let world = World::new();
        world.hub.behave(Behaviour {
            corrupt: Some(file.into()),
            ..Behaviour::default()
        });
        let error = world.fetch(CAT).unwrap_err();
        check_checksum(&world, &error, file, digits);
        assert!(!world.blob(CAT, file).exists() && !world.incomplete(CAT, file).exists());
        world.check_cache(CAT);
        world.hub.behave(Behaviour::default());
        world.fetch(CAT).unwrap();
    }
}

#[test]
fn damaged_left_over_is_removed_too() {
    let world = World::new();
    let incomplete = world.incomplete(CAT, ROOT_UNET);
    fs::create_dir_all(incomplete.parent().unwrap()).unwrap();
    fs::write(&incomplete, vec![7; 1000]).unwrap();
    let error = world.fetch(CAT).unwrap_err();
    check_checksum(&world, &error, ROOT_UNET, 64);
    world.fetch(CAT).unwrap();
}

#[test]
fn refusals_say_what_to_do() {
    let world = World::new();
    let error = |id: &str, options: FetchOptions| {
        fetch(id, &Files, &options, |_| ControlFlow::Continue(())).unwrap_err()
    };
    let check = |id: &str, options: FetchOptions, expected: &str| {
        assert_eq!(message(&error(id, options)), expected);
    };
    let revision = |revision: &str| FetchOptions {
        revision: Some(revision.into()),
        ..world.options()
    };
    check(
        "no/body",
        world.options(),
        "there is no repository `no/body` on the hub: check the name; a private one needs a token \
         in `HF_TOKEN`",
    );
    check(
        SD,
        revision("v9"),
        "`someone/stable-diffusion` has no revision `v9`: give a branch, a tag or a commit",
    );
    check(
        SD,
        revision("../x"),
        "`../x` is not a valid revision: give a branch, a tag or a commit",
    );
    check(
        "a/b/c",
        world.options(),
        "`a/b/c` is neither a folder nor the name of a repository (`owner/name`)",
    );
    let nobody = FetchOptions {
        endpoint: Some("http://127.0.0.1:9".into()),
        ..world.options()
    };
    // Without its source, which is the system's.
    assert_eq!(
        error(SD, nobody).to_string(),
        "cannot reach the hub at `http://127.0.0.1:9`: check the connection, `HTTPS_PROXY` and \
         `HF_ENDPOINT`; to work without it, fetch the model elsewhere and copy its folder here"
    );

    world
        .hub
        .publish_file("some/lora", "pytorch_lora_weights.safetensors", "1");
    check(
        "some/lora",
        world.options(),
        "`some/lora` has no file `model_index.json` in revision `main`",
    );
    world.hub.publish_file("some/xl", "model_index.json", "{}");
    check(
        "some/xl",
        world.options(),
        "`some/xl` cannot be used, and nothing more of it was fetched: it is neither a cat nor a \
         boat",
    );

    world.hub.behave(Behaviour {
        busy: 1,
        ..Behaviour::default()
    });
    let endpoint = world.hub.endpoint();
    let busy = format!(
        "the hub returned 503 for `{endpoint}/api/models/{SD}/revision/main`: try again later"
    );
    check(SD, world.options(), &busy);
    world.hub.behave(Behaviour {
        gated: true,
        ..Behaviour::default()
    });
    let gated = format!(
        "`{SD}` requires that you accept its licence: do so at {endpoint}/{SD}, then set \
         `HF_TOKEN` to your token"
    );
    check(SD, world.options(), &gated);
}

#[test]
fn token_opens_the_hub_and_is_not_given_to_its_storage() {
    let world = World::new();
    world.hub.behave(Behaviour {
        token: Some("hf_secret".into()),
        ..Behaviour::default()
    });
    let error = world.fetch(CAT).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the hub denies access to `{CAT}`: check the name and, if the repository is private, \
             set `HF_TOKEN` to a token that can read it"
        )
    );
    let options = FetchOptions {
        token: Some("hf_secret".into()),
        ..world.options()
    };
    world.hub.requests();
    resolve(CAT, &Files, &options).unwrap();
    let requests = world.hub.requests();
    assert!(
        requests
            .iter()
            .any(|request| request.path.starts_with("/storage/"))
    );
    for request in requests {
        let elsewhere = request.path.starts_with("/storage/");
        assert_eq!(request.token, !elsewhere, "{request:?}");
        assert_eq!(
            request.host.starts_with("localhost"),
            elsewhere,
            "{request:?}"
        );
    }
}

#[test]
fn progress_is_told_and_can_stop() {
    let world = World::new();
    let mut last = (0, 0);
    fetch(CAT, &Files, &world.options(), |event| {
        assert!(event.done <= event.size && event.file_done <= event.file_size);
        last = (event.done, event.size);
        ControlFlow::Continue(())
    })
    .unwrap();
    let files = ["config.json", "scheduler_config.json", ROOT_UNET];
    let size = |file| {
        fs::metadata(reference().join("ddpm/cat").join(file))
            .unwrap()
            .len()
    };
    let expected: u64 = files.into_iter().map(size).sum();
    assert_eq!(last, (expected, expected));

    let world = World::new();
    let error = fetch(CAT, &Files, &world.options(), |event| {
        if event.file == ROOT_UNET {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("stopped at `{ROOT_UNET}`: the received bytes are kept")
    );
    assert!(world.incomplete(CAT, ROOT_UNET).is_file());
    world.fetch(CAT).unwrap();
    world.check_cache(CAT);
}

#[test]
fn several_at_once_fetch_everything_once() {
    let world = World::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| world.fetch(SD).unwrap());
        }
    });
    let requests = world.hub.requests().into_iter();
    let transfers = requests.filter(|request| {
        request.file == UNET && request.from.is_some() && request.path.starts_with("/storage/")
    });
    assert_eq!(transfers.count(), 1);
    world.check_cache(SD);
}

/// `/dev/full` is a full disk; a link to it takes the place of the contents.
#[cfg(target_os = "linux")]
#[test]
fn full_disk() {
    let world = World::new();
    let incomplete = world.incomplete(CAT, ROOT_UNET);
    fs::create_dir_all(incomplete.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &incomplete).unwrap();
    let error = world.fetch(CAT).unwrap_err();
    assert_eq!(
        message(&error),
        format!(
            "the disk is full, no room for `{}`: free some space, or move the cache with \
             `HF_HOME`, and run again; the received bytes are kept: No space left on device (os \
             error 28)",
            incomplete.display()
        )
    );
    assert!(!world.blob(CAT, ROOT_UNET).exists());
    world.check_cache(CAT);
    fs::remove_file(&incomplete).unwrap();
    world.fetch(CAT).unwrap();
    world.check_cache(CAT);
}

#[test]
fn cache_that_cannot_be_written() {
    let world = World::new();
    let file = world.cache.path().join("a-file");
    fs::write(&file, "").unwrap();
    let options = FetchOptions {
        cache: Some(file.join("cache")),
        ..world.options()
    };
    let error = resolve(CAT, &Files, &options).unwrap_err();
    let HubError::Write { path, source } = &error else {
        panic!("{error}");
    };
    assert!(path.starts_with(file.join("cache/.locks")), "{error}");
    assert_eq!(source.kind(), io::ErrorKind::NotADirectory);
    assert_eq!(
        error.to_string(),
        format!("cannot write `{}` in the cache", path.display())
    );
}
