//! `msb mcp`: serves the tools of [`crate::mcp`] on standard input and output, until the client closes its end.

use clap::Args;
use msb_protocol::error::ApiError;
use rmcp::ServiceExt;
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::transport::io::stdio_pipes;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::mcp::{LINE_LEN_MAX, Server};
use crate::printer::Printer;
use crate::signals::Signals;

/// Options of `mcp`.
#[derive(Debug, Args)]
#[command(after_help = "docs/mcp.md shows how to register it in an MCP client, and what each tool does.")]
pub struct McpArgs {}

/// Carries it out.
///
/// # Errors
/// `internal` if the first message is no MCP.
pub async fn run(_: McpArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let mut signals = Signals::take();
    context
        .printer
        .terminal_note("msb mcp speaks the Model Context Protocol on stdin and stdout; an MCP client starts it");
    // The log is for people, whatever form data has elsewhere.
    let log = Printer::new(crate::arguments::Format::Text, context.printer.is_quiet());
    let server = Server::new(context.locator.clone(), log);
    let (input, output) = stdio_pipes();
    let transport = AsyncRwTransport::new_server(input, output).with_max_line_length(LINE_LEN_MAX);
    let serve = async {
        match server.serve(transport).await {
            Ok(service) => service.waiting().await.map(drop).map_err(ApiError::internal),
            // A client that goes away before it says a word has done nothing wrong.
            Err(rmcp::service::ServerInitializeError::ConnectionClosed(_)) => Ok(()),
            Err(error) => Err(ApiError::internal(format!("the MCP client cannot be understood: {error}"))
                .with_hint("msb mcp is started by an MCP client; see docs/mcp.md")),
        }
    };
    // Sandboxes that belong to this process are stopped and removed by the service once it has ended, whatever ends it.
    tokio::select! {
        outcome = serve => outcome.map(|()| ExitStatus::SUCCESS).map_err(Failure::Api),
        number = signals.ending() => Ok(ExitStatus::of_signal(number)),
    }
}
