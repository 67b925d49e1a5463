//! Words of textual inversions, which may have several vectors: in a tokenizer they are the tokens
//! `name`, `name_1`, ..., as in Diffusers.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokenizers::AddedToken;

use super::{CLIPTokenizer, TokenizerError, ids};

/// A name in prompts that stands for one or more vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Concept {
    /// What prompts say.
    pub name: String,
    /// The ids of the name as [`CLIPTokenizer::spell`] gives them.
    pub spelling: Vec<u32>,
    /// The ids of its vectors.
    pub ids: Vec<u32>,
}

impl CLIPTokenizer {
    /// Added tokens `name`, `name_1`, ... are one concept.
    pub(super) fn find_concepts(&mut self) {
        let added: BTreeMap<String, u32> = self
            .added_tokens()
            .into_iter()
            .map(|token| (token.content, token.id))
            .collect();
        for (name, id) in &added {
            let more = (1..).map_while(|index| added.get(&format!("{name}_{index}")));
            let ids: Vec<u32> = [id].into_iter().chain(more).copied().collect();
            if ids.len() > 1 {
                self.add_concept(Concept {
                    name: name.clone(),
                    spelling: vec![*id],
                    ids,
                });
            }
        }
    }

    fn add_concept(&mut self, concept: Concept) {
        self.concepts.push(concept);
        self.concepts
            .sort_by_key(|concept| Reverse(concept.name.len()));
    }

    /// Adds a word for `vectors` vectors of a textual inversion: the tokens `name`, `name_1`, ...
    /// The id of the first is returned; the others follow. In prompts the name stands for all of
    /// them. [`CLIPTextModel::set_token_embeddings`](crate::CLIPTextModel::set_token_embeddings)
    /// gives the text encoder their vectors.
    ///
    /// # Errors
    /// If the tokenizer has one of these tokens already, or the name is blank.
    ///
    /// # Panics
    /// If `vectors` is zero.
    pub fn add_token(&mut self, name: &str, vectors: usize) -> Result<u32, TokenizerError> {
        assert!(vectors > 0, "a token needs a vector");
        let mut spelling = self.spell(name)?;
        if spelling.is_empty() {
            return Err(TokenizerError::NoName);
        }
        let more = (1..vectors).map(|index| format!("{name}_{index}"));
        let names: Vec<String> = [name.to_string()].into_iter().chain(more).collect();
        // One more, which would become the last vector.
        let next = format!("{name}_{vectors}");
        let taken = names.iter().chain([&next]);
        if let Some(taken) = taken
            .into_iter()
            .find(|name| self.token_to_id(name).is_some())
        {
            return Err(TokenizerError::Exists(taken.clone()));
        }
        let tokens = names.into_iter().map(|name| AddedToken::from(name, false));
        let tokens: Vec<_> = tokens.collect();
        let tokenizer = Arc::make_mut(&mut self.tokenizer);
        tokenizer.add_tokens(&tokens);
        let id = |token: &AddedToken| tokenizer.token_to_id(&token.content);
        let ids: Vec<u32> = tokens.iter().filter_map(id).collect();
        let first = ids[0];
        // Punctuation is one token with what follows: `<x>,` ends with `>,`. So a name that begins
        // or ends with it is a token also where names are found by their tokens.
        let is_word = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
        if !is_word(name.chars().next()) || !is_word(name.chars().next_back()) {
            Arc::make_mut(&mut self.plain).add_tokens(&tokens[..1]);
            spelling = self.spell(name)?;
        }
        self.add_concept(Concept {
            name: name.to_string(),
            spelling,
            ids,
        });
        Ok(first)
    }

    /// The concepts, longest name first.
    pub(crate) fn concepts(&self) -> &[Concept] {
        &self.concepts
    }

    /// Ids of a text without start and end, in which the names of concepts are spelled.
    pub(crate) fn spell(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        ids(&self.plain, text)
    }

    /// The text with each name of several vectors replaced by the names of all of them: `<x>` by
    /// `<x> <x>_1`. Names are replaced where they are written exactly so, and only if they are
    /// among the text's tokens.
    ///
    /// # Errors
    /// If the tokenizers crate refuses the text.
    pub fn expand<'a>(&self, text: &'a str) -> Result<Cow<'a, str>, TokenizerError> {
        let mut found: Vec<&Concept> = self
            .concepts
            .iter()
            .filter(|concept| concept.ids.len() > 1)
            .collect();
        if !found.is_empty() {
            let tokens: HashSet<u32> = ids(&self.tokenizer, text)?.into_iter().collect();
            found.retain(|concept| tokens.contains(&concept.ids[0]));
        }
        if found.is_empty() {
            return Ok(Cow::Borrowed(text));
        }
        let mut expanded = String::new();
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let concept = found.iter().find(|concept| rest.starts_with(&concept.name));
            let length = concept.map_or(next.len_utf8(), |concept| concept.name.len());
            let (head, tail) = rest.split_at(length);
            expanded.push_str(head);
            for index in 1..concept.map_or(0, |concept| concept.ids.len()) {
                expanded.push_str(&format!(" {head}_{index}"));
            }
            rest = tail;
        }
        Ok(Cow::Owned(expanded))
    }
}
