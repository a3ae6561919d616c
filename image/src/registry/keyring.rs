//! The keyring of the desktop session (the freedesktop.org Secret Service), through `secret-tool`.
//!
//! Most servers have none; then [`available`] says so and logins go to a file.

use crate::registry::secret_program::{self, HelperError};

const PROGRAM: &str = "secret-tool";

/// Whether there is a session that could have a keyring.
pub(super) fn available(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let bus = variable("DBUS_SESSION_BUS_ADDRESS").is_some_and(|address| !address.is_empty());
    let programs = variable("PATH").unwrap_or_default();
    bus && programs.split(':').any(|folder| std::path::Path::new(folder).join(PROGRAM).exists())
}

/// Stores the password of a registry.
pub(super) fn store(registry: &str, password: &str) -> Result<(), HelperError> {
    let label = format!("--label=msb: {registry}");
    let arguments = ["store", &label, "service", "msb", "registry", registry];
    secret_program::ask(PROGRAM, &arguments, password.as_bytes()).map(drop)
}

/// The stored password of a registry.
pub(super) fn lookup(registry: &str) -> Option<String> {
    let arguments = ["lookup", "service", "msb", "registry", registry];
    let answer = secret_program::ask(PROGRAM, &arguments, b"").ok()?;
    String::from_utf8(answer).ok().filter(|password| !password.is_empty())
}

/// Forgets the password of a registry.
pub(super) fn clear(registry: &str) -> Result<(), HelperError> {
    secret_program::ask(PROGRAM, &["clear", "service", "msb", "registry", registry], b"").map(drop)
}
