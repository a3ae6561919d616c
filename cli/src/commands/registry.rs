//! `msb registry`: logins to registries, kept by the service.

use clap::{Args, Subcommand};
use msb_protocol::images::LoginRequest;

use super::pull::RegistryAccess;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::table::Table;

/// What to do with registries.
#[derive(Debug, Subcommand)]
pub enum RegistryCommand {
    /// Check a name and password with a registry and keep them
    Login(LoginArgs),
    /// Forget the name and password of a registry
    Logout(LogoutArgs),
    /// List registries with credentials or settings; never a secret
    #[command(name = "list", visible_alias = "ls")]
    List,
}

/// Options of `registry login`.
#[derive(Debug, Args)]
pub struct LoginArgs {
    /// The registry; Docker Hub if there is none
    #[arg(value_name = "HOST[:PORT]", default_value = "docker.io")]
    pub registry: String,
    /// How it is reached.
    #[command(flatten)]
    pub access: RegistryAccess,
}

/// Options of `registry logout`.
#[derive(Debug, Args)]
pub struct LogoutArgs {
    /// The registry; Docker Hub if there is none
    #[arg(value_name = "HOST[:PORT]", default_value = "docker.io")]
    pub registry: String,
}

/// Carries it out.
///
/// # Errors
/// Those of the registry and the service.
pub async fn run(command: RegistryCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        RegistryCommand::Login(args) => login(args, context).await,
        RegistryCommand::Logout(args) => {
            context.client().await?.logout(&args.registry).await?;
            context.printer.note(&format!("logged out of {}", args.registry));
            Ok(ExitStatus::SUCCESS)
        }
        RegistryCommand::List => list(context).await,
    }
}

async fn login(args: LoginArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let Some(credentials) = args.access.credentials(true)? else { return Ok(ExitStatus::FAILURE) };
    let request = LoginRequest {
        registry: args.registry,
        credentials,
        insecure: args.access.insecure,
        ca_certs: args.access.certificates()?,
    };
    let report = context.client().await?.login(&request).await?;
    if context.printer.is_json() {
        context.printer.json(&report)?;
    } else if report.stored_in == "keyring" {
        context.printer.note(&format!("logged in to {}; the password is in the keyring", report.registry));
    } else {
        context.printer.note(&format!("logged in to {}", report.registry));
        // Said openly: whoever reads the file has the password.
        context.printer.warning(&format!(
            "there is no keyring here: the password is kept, not encrypted, in {} (mode 0600)",
            report.stored_in
        ));
    }
    Ok(ExitStatus::SUCCESS)
}

async fn list(context: &Context) -> Result<ExitStatus, Failure> {
    let registries = context.client().await?.registries().await?.registries;
    if context.printer.is_json() {
        context.printer.json(&registries)?;
        return Ok(ExitStatus::SUCCESS);
    }
    let mut table = Table::new(&["REGISTRY", "USER", "CREDENTIAL", "MIRRORS", "INSECURE"]);
    for row in registries {
        let insecure = if row.insecure { "yes" } else { "" };
        table.row(vec![row.registry, row.username, row.source, row.mirrors.join(", "), insecure.into()]);
    }
    context.printer.table(&table)?;
    Ok(ExitStatus::SUCCESS)
}
