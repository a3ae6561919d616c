//! The calls about volumes. Part of [`Client`].

use msb_protocol::id::SandboxName;
use msb_protocol::volume::{CreateVolume, VolumeDetail, VolumeList};

use super::Client;
use crate::error::Error;

impl Client {
    /// Every volume.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn volumes(&self) -> Result<VolumeList, Error> {
        self.get("/v1/volumes").await
    }

    /// One volume.
    ///
    /// # Errors
    /// `volume_not_found`.
    pub async fn volume(&self, name: &SandboxName) -> Result<VolumeDetail, Error> {
        self.get(&format!("/v1/volumes/{name}")).await
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// `volume_already_exists`, `invalid_config`.
    pub async fn create_volume(&self, request: &CreateVolume) -> Result<VolumeDetail, Error> {
        self.post("/v1/volumes", request).await
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// `volume_not_found`, `volume_in_use` naming the users.
    pub async fn remove_volume(&self, name: &SandboxName) -> Result<(), Error> {
        self.delete(&format!("/v1/volumes/{name}")).await
    }
}
