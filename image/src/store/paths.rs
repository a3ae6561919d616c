//! Where everything in the store is. The only place that joins a digest to a directory.

use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::layer::{DATA_FILE, TREE_FILE};

/// A part of the store that lives and dies on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Original bytes: manifest, configuration or layer as it came.
    Blob(Digest),
    /// Data file and tree index of a layer, by diff_id.
    Layer(Digest),
    /// Merged metadata, by the digest of the chain of layers.
    Root(Digest),
}

/// The directories of one store.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    top: PathBuf,
}

impl Paths {
    pub(crate) fn new(home: &Path) -> Self {
        Self { top: home.join("images") }
    }

    pub(crate) fn top(&self) -> &Path {
        &self.top
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.top.join("lock")
    }

    pub(crate) fn format(&self) -> PathBuf {
        self.top.join("format")
    }

    pub(crate) fn temporary(&self) -> PathBuf {
        self.top.join("tmp")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.top.join("blobs").join("sha256")
    }

    /// The version is part of the path: a later msb makes its own files from the kept blobs.
    pub(crate) fn layers(&self) -> PathBuf {
        self.top.join("layers").join("v1")
    }

    pub(crate) fn roots(&self) -> PathBuf {
        self.top.join("roots").join("v1")
    }

    pub(crate) fn records(&self) -> PathBuf {
        self.top.join("records")
    }

    pub(crate) fn templates(&self) -> PathBuf {
        self.top.join("templates")
    }

    /// Downloads that are not finished.
    pub(crate) fn partials(&self) -> PathBuf {
        self.top.join("partial")
    }

    pub(crate) fn all(&self) -> [PathBuf; 7] {
        [self.temporary(), self.blobs(), self.layers(), self.roots(), self.records(), self.templates(), self.partials()]
    }

    pub(crate) fn partial(&self, digest: Digest) -> PathBuf {
        self.partials().join(digest.hex())
    }

    pub(crate) fn blob(&self, digest: Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(crate) fn layer(&self, diff_id: Digest) -> PathBuf {
        self.layers().join(diff_id.hex())
    }

    pub(crate) fn layer_data(&self, diff_id: Digest) -> PathBuf {
        self.layer(diff_id).join(DATA_FILE)
    }

    pub(crate) fn layer_tree(&self, diff_id: Digest) -> PathBuf {
        self.layer(diff_id).join(TREE_FILE)
    }

    pub(crate) fn root(&self, chain: Digest) -> PathBuf {
        self.roots().join(chain.hex())
    }

    pub(crate) fn record(&self, digest: Digest) -> PathBuf {
        self.records().join(format!("{}.json", digest.hex()))
    }

    pub(crate) fn part(&self, part: Part) -> PathBuf {
        match part {
            Part::Blob(digest) => self.blob(digest),
            Part::Layer(digest) => self.layer(digest),
            Part::Root(digest) => self.root(digest),
        }
    }
}

/// The digest that names the merged metadata of layers, bottom first.
pub(crate) fn chain_digest(diff_ids: impl Iterator<Item = Digest>) -> Digest {
    let mut text = String::from("msb root 1\n");
    for diff_id in diff_ids {
        text.push_str(&diff_id.hex());
        text.push('\n');
    }
    Digest::of(text.as_bytes())
}
