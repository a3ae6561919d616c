//! `msb version`: the client's version and that of the service, if one answers. Starts none.

use msb_protocol::control::VersionInfo;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

#[derive(Serialize)]
struct Versions<'a> {
    client: &'a str,
    service: Option<&'a VersionInfo>,
}

/// Carries it out.
///
/// # Errors
/// Those of a service that answers but cannot be used.
pub async fn run(context: &Context) -> Result<ExitStatus, Failure> {
    let client = env!("CARGO_PKG_VERSION");
    let service = context.locator.find().await?;
    let service = service.as_ref().map(msb_sdk::Client::version);
    if context.printer.is_json() {
        context.printer.json(&Versions { client, service })?;
    } else {
        let service = service.map_or("not running".to_owned(), |info| {
            format!("{} (API {}, process {})", info.version, info.api_version, info.pid)
        });
        context.printer.text(&format!("msb   {client}\nmsbd  {service}\n"))?;
    }
    Ok(ExitStatus::SUCCESS)
}
