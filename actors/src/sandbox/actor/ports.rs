//! The published ports of a sandbox: bound from its boot until it rests, watched while it sleeps. Called by the actor's steps; never accepts a
//! connection.

use actix::prelude::*;
use msb_protocol::error::ApiError;

use super::SandboxActor;
use crate::sandbox::machine::{By, Event, State};
use crate::sandbox::network::BoundPorts;
use crate::sandbox::view;

impl SandboxActor {
    /// Published ports are closed when the sandbox rests and watched while it sleeps.
    pub(super) fn mind_ports(&mut self, ctx: &mut Context<Self>) {
        let asleep = matches!(self.machine.state(), State::Asleep { .. });
        if !asleep && let Some((_, visit)) = self.port_watch.take() {
            ctx.cancel_future(visit);
        }
        if !view::holds_ports(self.machine.shown()) {
            self.ports = BoundPorts::default();
        }
        if !asleep || self.port_watch.is_some() || self.record.ports.is_empty() {
            return;
        }
        if self.ports.is_empty() {
            // A new daemon: the one before it held them and is gone.
            match BoundPorts::bind(&self.record.ports, &[]) {
                Ok(ports) => self.ports = ports,
                Err(error) => {
                    tracing::error!(sandbox = %self.record.name, error = %error.message, "a sleeping sandbox lost its published ports");
                    return;
                }
            }
        }
        let watch = match self.ports.watch() {
            Ok(watch) => watch,
            Err(error) => {
                tracing::error!(sandbox = %self.record.name, %error, "published ports cannot be watched");
                return;
            }
        };
        let visit = ctx.spawn(watch.visited().into_actor(self).map(|visited, this, ctx| {
            if visited {
                this.port_watch = None;
                this.tell(Event::Start { by: By::User, hold_main: false }, ctx);
            }
        }));
        self.port_watch = Some((watch, visit));
    }

    /// Binds the published ports unless they are bound.
    pub(super) fn bind_ports(&mut self) -> Result<(), ApiError> {
        let network = &self.record.spec.network;
        if !network.enabled || network.ports.is_empty() {
            self.record.ports = Vec::new();
        } else if self.ports.is_empty() {
            self.ports = BoundPorts::bind(&network.ports, &self.record.ports)?;
            self.record.ports = self.ports.ports().to_vec();
        }
        Ok(())
    }
}
