//! Who a process runs as: `USER|UID[:GROUP|GID]` looked up in the guest's passwd and group files by our own parser, because the
//! agent is static and must not load the image's name service. Pure; the texts come from the image and are hostile. Called by
//! `command`.

use msb_protocol::error::ErrorCode;

use crate::failure::GuestError;

/// Longest passwd or group file that is read, in bytes.
pub const FILE_LEN_MAX: usize = 4 << 20;
/// Most supplementary groups a process gets (NGROUPS_MAX).
const GROUPS_MAX: usize = 65_536;
/// Largest id that may be asked for, as docker has it; the kernel's own -1 means "no change" and must never get through.
const ID_MAX: u32 = i32::MAX as u32;

/// One entry of passwd(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PasswdEntry<'a> {
    /// Login name.
    pub name: &'a [u8],
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Home directory, may be empty.
    pub home: &'a [u8],
    /// Login shell, may be empty.
    pub shell: &'a [u8],
}

/// One entry of group(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupEntry<'a> {
    /// Name.
    pub name: &'a [u8],
    /// Group id.
    pub gid: u32,
    members: &'a [u8],
}

impl GroupEntry<'_> {
    fn has_member(&self, name: &[u8]) -> bool {
        !name.is_empty() && self.members.split(|byte| *byte == b',').any(|member| member == name)
    }
}

/// Who a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups, sorted, without doubles.
    pub groups: Vec<u32>,
    /// The home directory of its passwd entry; none without an entry or with an empty field.
    pub home: Option<String>,
    /// The login name of its passwd entry.
    pub name: Option<String>,
    /// The login shell of its passwd entry; none without an entry or with an empty field.
    pub shell: Option<String>,
}

/// The entries of a passwd file. A line that is none is skipped.
pub fn passwd_entries(text: &[u8]) -> impl Iterator<Item = PasswdEntry<'_>> {
    lines(text).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let uid = number(fields.next()?)?;
        let gid = number(fields.next()?)?;
        let _gecos = fields.next()?;
        let home = fields.next().unwrap_or_default();
        Some(PasswdEntry { name, uid, gid, home, shell: fields.next().unwrap_or_default() })
    })
}

/// The entries of a group file. A line that is none is skipped.
pub fn group_entries(text: &[u8]) -> impl Iterator<Item = GroupEntry<'_>> {
    lines(text).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let gid = number(fields.next()?)?;
        Some(GroupEntry { name, gid, members: fields.next().unwrap_or_default() })
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.starts_with(b"#"))
}

/// A decimal id within the allowed range.
fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok().filter(|id| *id <= ID_MAX)
}

/// Looks a user up. An empty `wanted` is root.
///
/// A name wins over a number, as in docker. A number without an entry keeps group 0 unless a group is given. A group that is
/// given leaves no supplementary groups.
///
/// # Errors
/// `user_not_found`, naming the user or the group.
pub fn resolve(wanted: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, GuestError> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let by_number = number(user.as_bytes());
    let entry = passwd_entries(passwd)
        .find(|entry| entry.name == user.as_bytes())
        .or_else(|| passwd_entries(passwd).find(|entry| Some(entry.uid) == by_number));
    let (uid, own_gid) = match (&entry, by_number) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(not_found("user", user, "/etc/passwd")),
    };
    let text = |field: for<'a> fn(&PasswdEntry<'a>) -> &'a [u8]| {
        let bytes = entry.as_ref().map(field).filter(|bytes| !bytes.is_empty())?;
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    };
    let (home, name, shell) = (text(|entry| entry.home), text(|entry| entry.name), text(|entry| entry.shell));
    let (gid, mut groups) = match wanted_group.filter(|name| !name.is_empty()) {
        Some(name) => (resolve_group(name, group)?, Vec::new()),
        None => {
            let member = entry.as_ref().map_or(&b""[..], |entry| entry.name);
            let groups = group_entries(group).filter(|entry| entry.has_member(member)).map(|entry| entry.gid);
            (own_gid, groups.take(GROUPS_MAX).collect())
        }
    };
    groups.sort_unstable();
    groups.dedup();
    Ok(Identity { uid, gid, groups, home, name, shell })
}

fn resolve_group(name: &str, group: &[u8]) -> Result<u32, GuestError> {
    group_entries(group)
        .find(|entry| entry.name == name.as_bytes())
        .map(|entry| entry.gid)
        .or_else(|| number(name.as_bytes()))
        .ok_or_else(|| not_found("group", name, "/etc/group"))
}

fn not_found(kind: &str, name: &str, file: &str) -> GuestError {
    let name: String = name.chars().take(64).collect();
    GuestError::new(ErrorCode::UserNotFound, format!("{kind} '{name}' is not in the sandbox's {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\n# comment:x:9:9::/:/\nbroken line\nann:x:1000:100:Ann:/home/ann:/bin/sh\r\n\
        42:x:7:7::/seven:\nempty:x:8:8:::\nhuge:x:4294967295:0::/:\n";
    const GROUP: &[u8] =
        b"root:x:0:\nusers:x:100:\nwheel:x:10:ann,root\ndocker:x:998:bob,ann\nbroken\nwheel2:x:10:ann\n";

    #[test]
    fn users_and_groups_are_found_as_docker_finds_them() {
        type Row = (&'static str, u32, u32, &'static [u32], Option<&'static str>);
        let table: [Row; 10] = [
            ("", 0, 0, &[10], Some("/root")),
            ("root", 0, 0, &[10], Some("/root")),
            ("ann", 1000, 100, &[10, 998], Some("/home/ann")),
            ("1000", 1000, 100, &[10, 998], Some("/home/ann")),
            ("ann:docker", 1000, 998, &[], Some("/home/ann")),
            ("ann:5", 1000, 5, &[], Some("/home/ann")),
            ("4711", 4711, 0, &[], None),
            ("4711:wheel", 4711, 10, &[], None),
            ("42", 7, 7, &[], Some("/seven")),
            ("empty", 8, 8, &[], None),
        ];
        for (wanted, uid, gid, groups, home) in table {
            let found = resolve(wanted, PASSWD, GROUP).unwrap();
            assert_eq!((found.uid, found.gid, found.home.as_deref()), (uid, gid, home), "{wanted}");
            assert_eq!(found.groups, groups, "{wanted}");
        }
        let ann = resolve("1000", PASSWD, GROUP).unwrap();
        assert_eq!((ann.name.as_deref(), ann.shell.as_deref()), (Some("ann"), Some("/bin/sh")));
        assert_eq!(resolve("empty", PASSWD, GROUP).unwrap().shell, None);
    }

    #[test]
    fn what_does_not_exist_is_named() {
        for wanted in ["bob", "huge", "4294967295", "-1", "99999999999", "ann:nobody", "0:4294967295"] {
            let error = resolve(wanted, PASSWD, GROUP).unwrap_err();
            assert_eq!(error.code, ErrorCode::UserNotFound, "{wanted}");
        }
        assert!(resolve("ann:nobody", PASSWD, GROUP).unwrap_err().message.contains("group 'nobody'"));
        assert!(resolve("root", b"", b"").is_err());
        assert_eq!(resolve("", b"", b"").unwrap().uid, 0);
    }

    proptest! {
        #[test]
        fn any_files_give_an_identity_or_an_error_and_never_the_kernels_minus_one(
            wanted in ".{0,20}", passwd in prop::collection::vec(any::<u8>(), 0..400), group in prop::collection::vec(any::<u8>(), 0..400)
        ) {
            if let Ok(identity) = resolve(&wanted, &passwd, &group) {
                prop_assert!(identity.uid <= ID_MAX && identity.gid <= ID_MAX);
                prop_assert!(identity.groups.len() <= GROUPS_MAX);
            }
        }

        #[test]
        fn an_entry_that_is_written_is_found(name in "[a-z][a-z0-9]{0,8}", uid in 0..=ID_MAX, gid in 0..=ID_MAX, home in "/[a-z/]{0,10}") {
            let passwd = format!("noise\n{name}:x:{uid}:{gid}:me:{home}:/bin/sh");
            let identity = resolve(&name, passwd.as_bytes(), b"").unwrap();
            prop_assert_eq!((identity.uid, identity.gid, identity.home), (uid, gid, Some(home)));
        }
    }
}
