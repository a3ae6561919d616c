//! The options of `run` and `create` that say what is mounted and what of the root is changed. The grammar is
//! `msb_protocol::mount`; here are the caller's own files: relative paths, whether one is a directory, what is to be copied.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use msb_protocol::mount::{Mount, MountSource, PATCHES_LEN_MAX, PATCHES_MAX, Patch, SCRIPTS_DIRECTORY};
use msb_protocol::spec::SandboxSpec;

use crate::failure::{self, Failure, invalid};

/// Levels of directories that `--copy` goes down.
const DEPTH_MAX: usize = 64;

/// What is mounted and what of the root is changed.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Mount options")]
pub struct MountArgs {
    /// Mount a directory or file of the host, or a named volume; options: ro rw noexec nosuid nodev
    #[arg(short, long = "volume", value_name = "SRC:DST[:OPTS]")]
    pub volumes: Vec<String>,
    /// Mount a directory of the host
    #[arg(long, value_name = "DIR:DST[:OPTS]")]
    pub mount_dir: Vec<String>,
    /// Mount one file of the host
    #[arg(long, value_name = "FILE:DST[:OPTS]")]
    pub mount_file: Vec<String>,
    /// Mount a named volume, made on first use: a shared directory, or a disk of its own
    #[arg(long, value_name = "NAME:DST[:kind=dir|disk,size=SIZE,quota=SIZE,OPTS]")]
    pub mount_named: Vec<String>,
    /// Mount a disk image of the host: raw, with an ext4
    #[arg(long, value_name = "FILE:DST[:OPTS]")]
    pub mount_disk: Vec<String>,
    /// Mount memory of the guest; options as above
    #[arg(long, value_name = "PATH[:SIZE][:OPTS]")]
    pub tmpfs: Vec<String>,
    /// Remove a path of the root before the workload
    #[arg(long, value_name = "PATH")]
    pub remove_path: Vec<String>,
    /// Make a directory of the root
    #[arg(long, value_name = "PATH")]
    pub mkdir: Vec<String>,
    /// Copy a file or directory of the host into the root
    #[arg(long, value_name = "SRC:DST")]
    pub copy: Vec<String>,
    /// Make a script that is on PATH; without a first line that begins with #! it is the shell's
    #[arg(long, value_name = "NAME=BODY")]
    pub script: Vec<String>,
}

impl MountArgs {
    /// Puts everything into a spec.
    ///
    /// # Errors
    /// `invalid_config`, `invalid_name` or `path_not_found` naming the value.
    pub fn apply(&self, spec: &mut SandboxSpec) -> Result<(), Failure> {
        for text in &self.volumes {
            let mut mount = Mount::parse_volume(text).map_err(Failure::Api)?;
            if let MountSource::Directory { path } = &mount.source {
                let path = whole(Path::new(path))?;
                // -v takes both, as docker's does.
                mount.source = if path.is_dir() { directory(&path)? } else { file(&path)? };
            }
            spec.mounts.push(mount);
        }
        for text in &self.mount_dir {
            let mut mount = Mount::parse_path(text, false).map_err(Failure::Api)?;
            mount.source = directory(&whole(Path::new(source_path(&mount)))?)?;
            spec.mounts.push(mount);
        }
        for text in &self.mount_file {
            let mut mount = Mount::parse_path(text, true).map_err(Failure::Api)?;
            mount.source = file(&whole(Path::new(source_path(&mount)))?)?;
            spec.mounts.push(mount);
        }
        for text in &self.mount_named {
            spec.mounts.push(Mount::parse_named(text).map_err(Failure::Api)?);
        }
        for text in &self.mount_disk {
            let mut mount = Mount::parse_disk(text).map_err(Failure::Api)?;
            let path = whole(Path::new(source_path(&mount)))?;
            if !path.is_file() {
                return Err(invalid(format!("{} is no disk image: it is not a regular file", path.display())));
            }
            mount.source = MountSource::Disk { path: utf8(&path)? };
            spec.mounts.push(mount);
        }
        for text in &self.tmpfs {
            spec.mounts.push(Mount::parse_tmpfs(text).map_err(Failure::Api)?);
        }
        spec.patches.extend(self.remove_path.iter().map(|path| Patch::Remove { path: path.clone() }));
        spec.patches.extend(self.mkdir.iter().map(|path| Patch::Mkdir { path: path.clone(), mode: 0o755 }));
        for text in &self.copy {
            let (source, target) =
                text.rsplit_once(':').ok_or_else(|| invalid(format!("{text:?} is no copy; write it as SRC:DST")))?;
            copy(&whole(Path::new(source))?, target.trim_end_matches('/'), 0, &mut spec.patches)?;
        }
        for text in &self.script {
            let patch = script(text)?;
            if spec.patches.iter().any(|other| other.path() == patch.path()) {
                return Err(invalid(format!("two scripts are called {}", patch.path())));
            }
            spec.patches.push(patch);
        }
        Ok(())
    }
}

fn source_path(mount: &Mount) -> &str {
    match &mount.source {
        MountSource::Directory { path } | MountSource::File { path } | MountSource::Disk { path } => path,
        MountSource::Named { .. } | MountSource::Tmpfs { .. } => "",
    }
}

/// The whole path of something that exists, without links: the daemon lives in another directory than the caller.
///
/// # Errors
/// `path_not_found` and the like.
pub fn whole(path: &Path) -> Result<PathBuf, Failure> {
    path.canonicalize().map_err(|error| failure::file(path, &error))
}

/// A path as text.
///
/// # Errors
/// `invalid_config` for one that is none.
pub fn utf8(path: &Path) -> Result<String, Failure> {
    path.to_str().map(String::from).ok_or_else(|| invalid(format!("the path {} is no UTF-8 text", path.display())))
}

fn directory(path: &Path) -> Result<MountSource, Failure> {
    if path.is_dir() {
        Ok(MountSource::Directory { path: utf8(path)? })
    } else {
        Err(invalid(format!("{} is no directory", path.display())))
    }
}

fn file(path: &Path) -> Result<MountSource, Failure> {
    if path.is_file() {
        Ok(MountSource::File { path: utf8(path)? })
    } else {
        Err(invalid(format!("{} is no regular file", path.display())))
    }
}

/// A file or tree as patches. Links stay links.
fn copy(source: &Path, target: &str, depth: usize, patches: &mut Vec<Patch>) -> Result<(), Failure> {
    let failed = |error: &std::io::Error| failure::file(source, error);
    let path = target.to_owned();
    let metadata = source.symlink_metadata().map_err(|error| failed(&error))?;
    let mode = metadata.permissions().mode() & 0o777;
    let kept: usize =
        patches.iter().map(|patch| if let Patch::File { content, .. } = patch { content.len() } else { 0 }).sum();
    let size = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    if patches.len() >= PATCHES_MAX || (metadata.is_file() && kept.saturating_add(size) > PATCHES_LEN_MAX) {
        return Err(invalid(format!(
            "{} is too much to copy: at most {PATCHES_MAX} files with {PATCHES_LEN_MAX} bytes; mount it with -v",
            source.display()
        )));
    }
    if metadata.is_symlink() {
        let to = utf8(&source.read_link().map_err(|error| failed(&error))?)?;
        patches.push(Patch::Link { path, to });
    } else if metadata.is_dir() {
        if depth >= DEPTH_MAX {
            return Err(invalid(format!("{} is nested too deeply", source.display())));
        }
        patches.push(Patch::Mkdir { path, mode });
        let mut entries =
            source.read_dir().and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(|error| failed(&error))?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = utf8(Path::new(&entry.file_name()))?;
            copy(&entry.path(), &format!("{target}/{name}"), depth + 1, patches)?;
        }
    } else if metadata.is_file() {
        let content = std::fs::read(source).map_err(|error| failed(&error))?;
        patches.push(Patch::File { path, content, mode });
    } else {
        return Err(invalid(format!("{} is neither a file nor a directory nor a link", source.display())));
    }
    Ok(())
}

fn script(text: &str) -> Result<Patch, Failure> {
    let (name, body) = text
        .split_once('=')
        .ok_or_else(|| invalid(format!("{text:?} is no script; write it as NAME=BODY, as in hello='echo hello'")))?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(invalid(format!("{name:?} is no name of a script: use letters, digits, '.', '_' and '-'")));
    }
    let body = if body.starts_with("#!") { format!("{body}\n") } else { format!("#!/bin/sh\n{body}\n") };
    Ok(Patch::File { path: format!("{SCRIPTS_DIRECTORY}/{name}"), content: body.into_bytes(), mode: 0o755 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(edit: impl FnOnce(&mut MountArgs)) -> Result<SandboxSpec, Failure> {
        let mut arguments = MountArgs::default();
        edit(&mut arguments);
        let mut spec = SandboxSpec::new("busybox");
        arguments.apply(&mut spec).map(|()| spec)
    }

    #[test]
    fn sources_are_whole_paths_of_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        std::fs::write(dir.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(dir.join("file"), dir.join("link")).unwrap();
        let shown = |source: &str, edit: fn(&mut MountArgs, String)| {
            spec(|args| edit(args, format!("{}/{source}:/d:ro", dir.display()))).map(|spec| spec.mounts[0].clone())
        };
        let volume = |args: &mut MountArgs, text| args.volumes.push(text);
        assert!(matches!(shown(".", volume).unwrap().source, MountSource::Directory { .. }));
        let through_link = shown("link", volume).unwrap();
        assert_eq!(through_link.source, MountSource::File { path: dir.join("file").to_str().unwrap().into() });
        assert!(through_link.options.read_only);
        assert!(shown("missing", volume).is_err());
        assert!(shown("file", |args, text| args.mount_dir.push(text)).is_err());
        assert!(shown(".", |args, text| args.mount_file.push(text)).is_err());
        assert!(shown(".", |args, text| args.mount_disk.push(text)).is_err());
    }

    #[test]
    fn copies_are_whole_trees_in_order_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/b"), "2").unwrap();
        std::fs::write(dir.path().join("a"), "1").unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        let copied = spec(|args| args.copy.push(format!("{}:/opt/", dir.path().display()))).unwrap();
        let paths: Vec<_> = copied.patches.iter().map(Patch::path).collect();
        assert_eq!(paths, ["/opt", "/opt/a", "/opt/link", "/opt/sub", "/opt/sub/b"]);
        std::fs::write(dir.path().join("large"), vec![0; PATCHES_LEN_MAX]).unwrap();
        assert!(spec(|args| args.copy.push(format!("{}:/opt", dir.path().display()))).is_err());
        assert!(spec(|args| args.copy.push("nowhere".into())).is_err());
    }

    #[test]
    fn scripts_have_names_and_a_first_line() {
        let made =
            spec(|args| args.script = vec!["hi=echo hi".into(), "py=#!/usr/bin/python3\nprint(1)".into()]).unwrap();
        let text = |index: usize| match &made.patches[index] {
            Patch::File { path, content, mode: 0o755 } => format!("{path} {}", String::from_utf8_lossy(content)),
            other => panic!("{other:?}"),
        };
        assert_eq!(text(0), "/.msb/scripts/hi #!/bin/sh\necho hi\n");
        assert_eq!(text(1), "/.msb/scripts/py #!/usr/bin/python3\nprint(1)\n");
        for bad in ["hi", "=x", "../x=1", "a/b=1", ".x=1"] {
            assert!(spec(|args| args.script.push(bad.into())).is_err(), "{bad}");
        }
        assert!(spec(|args| args.script = vec!["a=1".into(), "a=2".into()]).is_err());
    }
}
