//! A collection as it waits for a backend: its readings as bytes, numbers as short as they are. A thousand sandboxes times sixty
//! collections are a third of what they are as structures. Pure; called by `export`.

use std::sync::Arc;

use crate::point::{Collection, Host, Identity, Reading};

/// The collection.
#[derive(Debug)]
pub(crate) struct Waiting {
    host: Arc<Host>,
    taken_ns: u64,
    states: Vec<(String, u64)>,
    attributes_dropped: u64,
    /// Who each of the readings is of: shared between collections.
    who: Vec<Arc<Identity>>,
    readings: Vec<u8>,
}

impl Waiting {
    /// Packs a collection.
    ///
    /// # Errors
    /// Those of the encoding; numbers always have one.
    pub(crate) fn pack(collection: Collection) -> Result<Self, postcard::Error> {
        let Collection { host, taken_ns, states, readings, attributes_dropped } = collection;
        let packed = postcard::to_stdvec(&readings)?.into_boxed_slice().into_vec();
        let who = readings.into_iter().map(|reading| reading.who).collect();
        Ok(Self { host, taken_ns, states, attributes_dropped, who, readings: packed })
    }

    /// The collection again.
    ///
    /// # Errors
    /// Those of the encoding; what was packed here can be unpacked.
    pub(crate) fn unpack(&self) -> Result<Collection, postcard::Error> {
        let mut readings: Vec<Reading> = postcard::from_bytes(&self.readings)?;
        for (reading, who) in readings.iter_mut().zip(&self.who) {
            reading.who = Arc::clone(who);
        }
        Ok(Collection {
            host: Arc::clone(&self.host),
            taken_ns: self.taken_ns,
            states: self.states.clone(),
            readings,
            attributes_dropped: self.attributes_dropped,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::tests::{fleet, snapshot};
    use crate::collect::{AttributeChoice, Memory, collect};

    #[test]
    fn what_is_packed_comes_out_as_it_was_and_is_small() {
        for snapshot in [snapshot(), fleet(1_000, 7)] {
            let collection = collect(&snapshot, &AttributeChoice::default(), &mut Memory::default());
            let waiting = Waiting::pack(collection.clone()).unwrap();
            assert!(waiting.readings.len() < 160 * collection.readings.len(), "{}", waiting.readings.len());
            let unpacked = waiting.unpack().unwrap();
            assert_eq!(format!("{unpacked:?}"), format!("{collection:?}"));
            let shared = unpacked.readings.iter().zip(&collection.readings);
            assert!(shared.into_iter().all(|(a, b)| Arc::ptr_eq(&a.who, &b.who)));
        }
    }
}
