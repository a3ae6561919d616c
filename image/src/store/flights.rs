//! Downloads under way, by blob: the first pull that wants a blob fetches it, the others wait for it and take it from the store.
//!
//! A flight ends when its blob and layer have their final names, or when its pull gave up; then those who waited look again. No pull
//! waits for another while something of its own is unfinished business of a third, so there is no circle to wait in.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::digest::Digest;
use crate::layer::Dropped;
use crate::store::LayerRecord;

/// All downloads of a store.
#[derive(Default)]
pub(crate) struct Flights {
    under_way: Mutex<HashMap<Digest, Arc<Flight>>>,
}

/// One download.
#[derive(Default)]
pub(crate) struct Flight {
    /// Bytes that are here.
    pub(crate) bytes: AtomicU64,
    outcome: Mutex<Option<Option<(LayerRecord, Dropped)>>>,
    landed: Condvar,
}

/// What asking for a blob gives.
pub(crate) enum Claim<'a> {
    /// It is the caller's to fetch.
    Own(FlightGuard<'a>),
    /// Somebody fetches it.
    Others(Arc<Flight>),
}

/// The right to fetch a blob; dropped without [`FlightGuard::landed`], the fetch has failed.
pub(crate) struct FlightGuard<'a> {
    flights: &'a Flights,
    digest: Digest,
    pub(crate) flight: Arc<Flight>,
}

impl Flights {
    pub(crate) fn claim(&self, digest: Digest) -> Claim<'_> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = under_way.get(&digest) {
            return Claim::Others(Arc::clone(flight));
        }
        let flight = Arc::new(Flight::default());
        under_way.insert(digest, Arc::clone(&flight));
        Claim::Own(FlightGuard { flights: self, digest, flight })
    }

    /// Whether a blob is being fetched: its unfinished file is not anybody's to remove.
    pub(crate) fn is_under_way(&self, digest: Digest) -> bool {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&digest)
    }
}

impl Flight {
    /// Waits a moment; `Some` once the flight has ended, with the layer if it succeeded.
    pub(crate) fn wait(&self, moment: Duration) -> Option<Option<(LayerRecord, Dropped)>> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if outcome.is_some() {
            return outcome.clone();
        }
        let (outcome, _) = self.landed.wait_timeout(outcome, moment).unwrap_or_else(PoisonError::into_inner);
        outcome.clone()
    }

    fn end(&self, result: Option<(LayerRecord, Dropped)>) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if outcome.is_none() {
            *outcome = Some(result);
        }
        self.landed.notify_all();
    }
}

impl FlightGuard<'_> {
    /// The layer is in the store.
    pub(crate) fn landed(self, record: LayerRecord, dropped: Dropped) {
        self.flight.end(Some((record, dropped)));
    }
}

impl Drop for FlightGuard<'_> {
    fn drop(&mut self) {
        self.flights.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.digest);
        self.flight.end(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_claim_waits_and_a_failed_flight_can_be_claimed_again() {
        let flights = Flights::default();
        let digest = Digest::of(b"blob");
        let Claim::Own(guard) = flights.claim(digest) else { panic!("the first claim is the caller's") };
        let Claim::Others(flight) = flights.claim(digest) else { panic!("the second claim waits") };
        assert!(flight.wait(Duration::from_millis(1)).is_none() && flights.is_under_way(digest));
        drop(guard);
        assert_eq!(flight.wait(Duration::from_secs(60)), Some(None));
        assert!(!flights.is_under_way(digest) && matches!(flights.claim(digest), Claim::Own(_)));
    }
}
