//! DNS pins: which addresses this sandbox got for which names through our own resolver, and until when. A name rule matches a
//! connection only by a pin, so it never opens an address the name did not lead to. Written by `dns`, read by the policy engine.
//! Never holds more than [`PINS_COUNT_MAX`] pairs.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use msb_protocol::network::DomainName;

/// Most pairs of name and address. A page of the web takes a few dozen; a guest that fills it loses its oldest pins.
pub const PINS_COUNT_MAX: usize = 4096;
/// Shortest life of a pin: programs look a name up and connect to it, or retry, a little after a short TTL.
pub const PIN_LIFE_MIN: Duration = Duration::from_secs(60);
/// Longest life of a pin, whatever the TTL says.
pub const PIN_LIFE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug)]
struct Pin {
    name: DomainName,
    expires: Duration,
}

/// The pins of one sandbox.
#[derive(Debug, Default)]
pub struct Pins {
    by_address: HashMap<IpAddr, Vec<Pin>>,
    count: usize,
}

impl Pins {
    /// Remembers that `name` led to `address`.
    pub fn insert(&mut self, now: Duration, name: &DomainName, address: IpAddr, ttl: Duration) {
        let address = address.to_canonical();
        let expires = now + ttl.clamp(PIN_LIFE_MIN, PIN_LIFE_MAX);
        if let Some(pin) =
            self.by_address.get_mut(&address).and_then(|pins| pins.iter_mut().find(|pin| pin.name == *name))
        {
            pin.expires = pin.expires.max(expires);
            return;
        }
        if self.count >= PINS_COUNT_MAX {
            self.make_room(now);
        }
        self.by_address.entry(address).or_default().push(Pin { name: name.clone(), expires });
        self.count += 1;
    }

    /// Drops what expired, and if nothing did, the sixteenth of all pins that expires first, so that a full table is not
    /// searched through at each insertion.
    fn make_room(&mut self, now: Duration) {
        self.retain(|pin| pin.expires > now);
        if self.count < PINS_COUNT_MAX {
            return;
        }
        let mut ends: Vec<Duration> = self.by_address.values().flatten().map(|pin| pin.expires).collect();
        let (_, cut, _) = ends.select_nth_unstable(PINS_COUNT_MAX / 16);
        let cut = *cut;
        let mut left = PINS_COUNT_MAX / 16;
        self.retain(|pin| {
            let goes = left > 0 && pin.expires <= cut;
            left -= usize::from(goes);
            !goes
        });
    }

    fn retain(&mut self, mut keep: impl FnMut(&Pin) -> bool) {
        self.by_address.retain(|_, pins| {
            pins.retain(&mut keep);
            !pins.is_empty()
        });
        self.count = self.by_address.values().map(Vec::len).sum();
    }

    /// The names that lead to `address` now.
    pub fn names_of(&self, now: Duration, address: IpAddr) -> impl Iterator<Item = &DomainName> {
        let pins = self.by_address.get(&address.to_canonical()).map_or(&[][..], Vec::as_slice);
        pins.iter().filter(move |pin| pin.expires > now).map(|pin| &pin.name)
    }

    /// The addresses that `name` leads to now, in order.
    #[must_use]
    pub fn addresses_of(&self, now: Duration, name: &DomainName) -> Vec<IpAddr> {
        let holds = |pins: &Vec<Pin>| pins.iter().any(|pin| pin.expires > now && pin.name == *name);
        let mut addresses: Vec<_> =
            self.by_address.iter().filter(|(_, pins)| holds(pins)).map(|(address, _)| *address).collect();
        addresses.sort_unstable();
        addresses
    }

    /// Pairs held, expired ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_pin_lives_as_long_as_its_ttl_within_bounds() {
        let name: DomainName = "a.example".parse().unwrap();
        for (ttl, life) in [(0, 60), (59, 60), (61, 61), (1 << 30, 24 * 60 * 60)] {
            let mut pins = Pins::default();
            let address = IpAddr::V4(Ipv4Addr::new(1, 2, 3, 4));
            pins.insert(SECOND, &name, address, ttl * SECOND);
            let at = |seconds: u32| pins.names_of(seconds * SECOND, address).count();
            assert_eq!((at(life), at(life + 1)), (1, 0), "ttl {ttl}");
            assert_eq!(pins.addresses_of(SECOND, &name), [address]);
        }
    }

    #[test]
    fn the_table_is_bounded_and_the_oldest_go_first() {
        let mut pins = Pins::default();
        let name: DomainName = "a.example".parse().unwrap();
        let address = |n: usize| IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(n).unwrap()));
        for n in 0..PINS_COUNT_MAX {
            pins.insert(Duration::from_millis(n as u64), &name, address(n), 100 * SECOND);
        }
        assert_eq!(pins.len(), PINS_COUNT_MAX);
        assert_eq!(pins.names_of(SECOND, address(0)).count(), 1);
        pins.insert(5 * SECOND, &name, address(PINS_COUNT_MAX), 100 * SECOND);
        assert_eq!(pins.len(), PINS_COUNT_MAX - PINS_COUNT_MAX / 16 + 1);
        assert_eq!(
            (pins.names_of(SECOND, address(0)).count(), pins.names_of(SECOND, address(PINS_COUNT_MAX)).count()),
            (0, 1)
        );
        // The same pair again is one pin.
        let before = pins.len();
        pins.insert(6 * SECOND, &name, address(PINS_COUNT_MAX), 100 * SECOND);
        assert_eq!(pins.len(), before);
    }
}
