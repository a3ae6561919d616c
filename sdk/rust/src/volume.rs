//! Named volumes of the service of this environment; a [`Client`] has the same calls for a given one. What a sandbox mounts is said with
//! [`crate::SandboxBuilder::mount`].

use msb_protocol::mount::volume_name;
use msb_protocol::volume::{CreateVolume, VolumeDetail};

use crate::client::Client;
use crate::error::Error;

pub use msb_protocol::mount::VolumeKind;

/// The named volumes of a service.
#[derive(Clone, Copy, Debug)]
pub struct Volume;

impl Volume {
    /// Makes a volume; the size in MiB is a disk's.
    ///
    /// # Errors
    /// `invalid_name`, `volume_already_exists`, `invalid_config`.
    pub async fn create(name: &str, kind: VolumeKind, size_mib: Option<u32>) -> Result<VolumeDetail, Error> {
        let name = volume_name(name).map_err(Error::InvalidConfig)?;
        Client::connect().await?.create_volume(&CreateVolume { name, kind, size_mib }).await
    }

    /// One volume.
    ///
    /// # Errors
    /// `invalid_name`, `volume_not_found`.
    pub async fn get(name: &str) -> Result<VolumeDetail, Error> {
        let name = volume_name(name).map_err(Error::InvalidConfig)?;
        Client::connect().await?.volume(&name).await
    }

    /// Every volume, by name.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn list() -> Result<Vec<VolumeDetail>, Error> {
        Ok(Client::connect().await?.volumes().await?.volumes)
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// `invalid_name`, `volume_not_found`, `volume_in_use` naming the sandboxes.
    pub async fn remove(name: &str) -> Result<(), Error> {
        let name = volume_name(name).map_err(Error::InvalidConfig)?;
        Client::connect().await?.remove_volume(&name).await
    }
}
