//! From what was typed as a model to a folder.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use diffuse_pipelines::{ModelIndex, PipelineKind};
#[cfg(feature = "hub")]
use diffuse_pipelines::{
    PipelineError,
    hub::{self, FetchOptions, HubError, ModelFiles, PipelineFiles, Snapshot},
};
use tempfile::TempDir;

use crate::args::{Inspect, Model};
use crate::builtin::{builtin, unpack};
#[cfg(feature = "hub")]
use crate::progress::DownloadProgress;

/// Where a model is.
pub struct Source {
    pub folder: PathBuf,
    /// The commit, of a model from the hub.
    pub commit: Option<String>,
    /// The folder, if it is to last no longer than this.
    pub temporary: Option<TempDir>,
}

/// Finds the model for a pipeline: the one that was named, or else the small one that the program
/// carries.
pub fn find_model(
    model: &Model,
    pipeline: PipelineKind,
    no_safety_checker: bool,
    quiet: bool,
) -> Result<Source> {
    let Some(named) = &model.model else {
        for (option, given) in [
            ("--revision", model.revision.is_some()),
            ("--variant", model.variant.is_some()),
        ] {
            if given {
                bail!("`{option}` is for a checkpoint: name it with `--model`");
            }
        }
        let temporary = unpack(builtin(pipeline))?;
        return Ok(Source {
            folder: temporary.path().to_path_buf(),
            commit: None,
            temporary: Some(temporary),
        });
    };
    let wanted = Wanted {
        model: named,
        revision: model.revision.as_deref(),
        variant: model.variant.as_deref(),
        pipeline: Some(pipeline),
        no_safety_checker,
        quiet,
    };
    let source = wanted.find()?;
    check_command(&source.folder, pipeline)?;
    Ok(source)
}

/// Names the other command, if a model is one of its. What else is wrong with it, loading says.
fn check_command(folder: &Path, pipeline: PipelineKind) -> Result<()> {
    let Ok(index) = ModelIndex::read(folder) else {
        return Ok(());
    };
    let command = match PipelineKind::of(&index) {
        Some(other) if other != pipeline => match other {
            PipelineKind::StableDiffusion => "txt2img",
            PipelineKind::Unconditional => "ddpm",
        },
        _ => return Ok(()),
    };
    match pipeline.check(&index) {
        Ok(()) => Ok(()),
        Err(error) => bail!("{error}; `diffuse {command}` is for it"),
    }
}

/// Finds a ControlNet: a folder, a file, or one that is named as on the hub.
pub fn find_controlnet(model: &Path, quiet: bool) -> Result<PathBuf> {
    let wanted = Wanted {
        model,
        revision: None,
        variant: None,
        pipeline: None,
        no_safety_checker: true,
        quiet,
    };
    let Some(id) = wanted.hub_id() else {
        return Ok(model.to_path_buf());
    };
    #[cfg(feature = "hub")]
    let found = wanted
        .fetch_files(id, &ModelFiles::default(), false)
        .map(|snapshot| snapshot.folder)
        .map_err(|source| hub_error(id, source));
    #[cfg(not(feature = "hub"))]
    let found = wanted.find_on_hub(id).map(|source| source.folder);
    found
}

#[cfg(feature = "hub")]
fn hub_error(id: &str, source: HubError) -> anyhow::Error {
    let (id, source) = (id.to_string(), Box::new(source));
    PipelineError::Hub { id, source }.into()
}

/// Which model is wanted.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
pub struct Wanted<'a> {
    pub model: &'a Path,
    pub revision: Option<&'a str>,
    pub variant: Option<&'a str>,
    /// The pipeline that it has to be of; any by default.
    pub pipeline: Option<PipelineKind>,
    /// Whether the safety checker is left out.
    pub no_safety_checker: bool,
    pub quiet: bool,
}

impl<'a> Wanted<'a> {
    pub fn of_inspect(args: &'a Inspect) -> Self {
        Self {
            model: &args.model,
            revision: args.revision.as_deref(),
            variant: args.variant.as_deref(),
            pipeline: None,
            no_safety_checker: false,
            quiet: false,
        }
    }

    /// Finds the model, and fetches it if it is named as on the hub.
    pub fn find(&self) -> Result<Source> {
        if let Some(id) = self.hub_id() {
            return self.find_on_hub(id);
        }
        if let Some(revision) = self.revision.filter(|_| self.model.exists()) {
            bail!(
                "`--revision {revision}` is for models from the hub, but `{}` is on this machine",
                self.model.display()
            );
        }
        // If it is not there, loading says so.
        Ok(Source {
            folder: self.model.to_path_buf(),
            commit: None,
            temporary: None,
        })
    }

    #[cfg(feature = "hub")]
    fn hub_id(&self) -> Option<&str> {
        hub::as_hub_id(self.model)
    }

    #[cfg(feature = "hub")]
    fn find_on_hub(&self, id: &str) -> Result<Source> {
        let snapshot = self
            .fetch(id, false)
            .map_err(|source| hub_error(id, source))?;
        Ok(Source {
            folder: snapshot.folder,
            commit: Some(snapshot.commit),
            temporary: None,
        })
    }

    /// The snapshot of a repository; with `update`, of the commit that the revision means today.
    #[cfg(feature = "hub")]
    pub fn fetch(&self, id: &str, update: bool) -> Result<Snapshot, HubError> {
        let files = PipelineFiles {
            pipeline: self.pipeline,
            variant: self.variant.map(String::from),
            no_safety_checker: self.no_safety_checker,
        };
        self.fetch_files(id, &files, update)
    }

    #[cfg(feature = "hub")]
    fn fetch_files(
        &self,
        id: &str,
        files: &impl hub::Wanted,
        update: bool,
    ) -> Result<Snapshot, HubError> {
        let options = FetchOptions {
            revision: self.revision.map(String::from),
            update,
            ..FetchOptions::from_env()
        };
        let mut progress = DownloadProgress::new(self.quiet);
        let snapshot = hub::fetch(id, files, &options, |event| progress.update(&event));
        progress.finish();
        snapshot
    }

    /// `owner/name`, as far as can be told without the hub's own rules.
    #[cfg(not(feature = "hub"))]
    fn hub_id(&self) -> Option<&str> {
        let id = self.model.to_str().filter(|_| !self.model.exists())?;
        let (owner, name) = id.split_once('/')?;
        let is_name = |part: &str| !part.is_empty() && !part.starts_with('.');
        (is_name(owner) && is_name(name) && !name.contains('/')).then_some(id)
    }

    #[cfg(not(feature = "hub"))]
    fn find_on_hub(&self, id: &str) -> Result<Source> {
        bail!(
            "there is no folder `{id}`; to have it fetched from the hub, build the program with \
             `--features hub`"
        )
    }
}
