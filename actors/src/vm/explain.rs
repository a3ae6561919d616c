//! `msb-vmm --explain`: asks the policy engine about a network that does not run. The engine lives in the VM process's program and nowhere
//! else, so there is one. Called by `vm::process` alone.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::network::VmNetwork;
use msb_protocol::vmm::NetworkExplanation;
use tokio::io::AsyncWriteExt;

/// Time for the answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Asks.
///
/// # Errors
/// `invalid_request` for a target that is none.
pub(super) async fn run(program: PathBuf, network: VmNetwork, target: String) -> Result<NetworkExplanation, ApiError> {
    let asking = async {
        let mut child = tokio::process::Command::new(program)
            .arg("--explain")
            .arg(&target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .env_clear()
            .kill_on_drop(true)
            .spawn()
            .map_err(ApiError::internal)?;
        let text = serde_json::to_vec(&network).map_err(ApiError::internal)?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(&text).await.map_err(ApiError::internal)?;
        }
        let output = child.wait_with_output().await.map_err(ApiError::internal)?;
        serde_json::from_slice::<Result<NetworkExplanation, ApiError>>(&output.stdout).map_err(ApiError::internal)?
    };
    tokio::time::timeout(LIMIT, asking)
        .await
        .unwrap_or_else(|_| Err(ApiError::new(ErrorCode::Internal, "the policy engine did not answer")))
}
