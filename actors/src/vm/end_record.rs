//! How a VM process ended: what it left in its run's directories, or what is to be said where it left nothing.
//!
//! Called by [`super::driver`] and by [`super::process`], which looks for processes that may be gone. It never writes, and believes only what names
//! the run that is asked for.

use std::path::Path;
use std::process::ExitStatus;

use msb_protocol::id::BootId;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::vmm::{BOOT_ERROR_FILE, BootError, END_FILE, EndRecord};

use super::Gone;
use crate::identity::{self, ProcessIdentity};

/// Largest record file that is read back, in bytes.
const RECORD_LEN_MAX: u64 = 1 << 20;

/// What the run left behind, or what its absence says.
pub(super) fn read_end(
    run_dir: &Path,
    log_dir: &Path,
    boot_id: BootId,
    status: Option<ExitStatus>,
    main_end: Option<ProcessEnd>,
    identity: Option<&ProcessIdentity>,
) -> Gone {
    if let Some(record) = read_record::<EndRecord>(&run_dir.join(END_FILE)).filter(|record| record.boot_id == boot_id) {
        return from_record(record, log_dir);
    }
    let rebooted = identity.is_some_and(|identity| identity.host_boot_id != identity::host_boot_id());
    let (cause, message) = match status {
        _ if rebooted => (EndCause::HostShutdown, "the host was restarted meanwhile".to_owned()),
        Some(status) => (EndCause::VmmCrash, format!("the VM process ended without a record: {status}")),
        None => (EndCause::VmmCrash, "the VM process is gone and left no record".to_owned()),
    };
    Gone { cause, main_end, message, boot_error: read_boot_error(log_dir, boot_id), sample: None }
}

pub(super) fn from_record(record: EndRecord, log_dir: &Path) -> Gone {
    let boot_error = record.boot_error.or_else(|| read_boot_error(log_dir, record.boot_id));
    let EndRecord { cause, main_end, message, sample, .. } = record;
    Gone { cause, main_end, message, boot_error, sample }
}

fn read_boot_error(log_dir: &Path, boot_id: BootId) -> Option<BootError> {
    read_record::<BootError>(&log_dir.join(BOOT_ERROR_FILE)).filter(|error| error.boot_id == boot_id)
}

fn read_record<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    use std::io::Read;
    let file = std::fs::File::open(path).ok()?;
    let mut text = Vec::new();
    file.take(RECORD_LEN_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
