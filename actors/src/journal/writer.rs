//! The thread that owns the redb file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use msb_protocol::control::EventRecord;
use msb_protocol::error::{ApiError, ErrorCode};
use redb::{ConcurrencyMode, Database, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::record::{EventDraft, SandboxRecord, SnapshotRecord, seal, unseal};
use super::{Change, Command, EVENTS_MAX, Found, JournalError};
use crate::clock::Clock;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SANDBOXES: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("sandboxes");
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const QUARANTINE: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("quarantine");

/// redb's cache in bytes: the journal is small, and its default of 1 GiB would let an idle daemon grow.
const CACHE_LEN: usize = 2 << 20;
/// Changes that share one fsync.
const BATCH_LEN: usize = 256;

/// A step from one schema to the next.
pub type Migration = fn(&WriteTransaction) -> Result<(), String>;

/// Step `n` leads from schema `n + 1` to `n + 2`. Append only.
pub const MIGRATIONS: &[Migration] = &[];

pub(super) struct Writer {
    path: PathBuf,
    database: Option<Database>,
    clock: Arc<dyn Clock>,
    live: broadcast::Sender<Arc<EventRecord>>,
    sequence: u64,
}

impl Writer {
    pub(super) fn open(
        path: &Path,
        clock: Arc<dyn Clock>,
        migrations: &[Migration],
        live: broadcast::Sender<Arc<EventRecord>>,
    ) -> Result<(Self, Found), JournalError> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(|source| JournalError::Io { path: directory.into(), source })?;
        }
        let refused = |reason: String| JournalError::Open { path: path.into(), reason };
        let mut found = Found::default();
        let mut database = match open_database(path) {
            Ok(database) => database,
            Err(reason) if is_damage(&reason) => {
                // Nothing can be read from it, so nothing is lost by going on without it; the file stays for repair by hand.
                let aside = path.with_extension(format!("damaged-{}", clock.wall().as_second()));
                std::fs::rename(path, &aside).map_err(|source| JournalError::Io { path: path.into(), source })?;
                found.problems.push(format!(
                    "the journal was damaged ({reason}) and is now {}; sandboxes recorded in it are unknown",
                    aside.display()
                ));
                open_database(path).map_err(refused)?
            }
            Err(reason) => return Err(refused(reason)),
        };
        let known = migrations.len() as u64 + 1;
        let schema = schema_of(&database).map_err(refused)?.unwrap_or(known);
        if schema > known {
            return Err(JournalError::TooNew { path: path.into(), found: schema, known });
        }
        if schema < known {
            drop(database);
            let backup = path.with_extension(format!("schema-{schema}.bak"));
            std::fs::copy(path, &backup).map_err(|source| JournalError::Io { path: backup.clone(), source })?;
            found.problems.push(format!(
                "the journal was brought from schema {schema} to {known}; the old one is {}",
                backup.display()
            ));
            database = open_database(path).map_err(refused)?;
        }
        let sequence = prepare(&database, schema, migrations, &mut found).map_err(refused)?;
        Ok((Self { path: path.into(), database: Some(database), clock, live, sequence }, found))
    }

    pub(super) fn run(&mut self, queue: &mut mpsc::Receiver<Command>) {
        while let Some(first) = queue.blocking_recv() {
            let mut writes = Vec::new();
            let mut next = Some(first);
            // Reads keep their place behind the writes that came before them.
            while let Some(command) = next {
                match command {
                    Command::Write(change, reply) => writes.push((change, reply)),
                    read => {
                        self.commit(std::mem::take(&mut writes));
                        self.read(read);
                    }
                }
                next = if writes.len() < BATCH_LEN { queue.try_recv().ok() } else { None };
            }
            self.commit(writes);
        }
    }

    fn commit(&mut self, writes: Vec<(Change, oneshot::Sender<Result<(), ApiError>>)>) {
        if writes.is_empty() {
            return;
        }
        let outcome = self.apply(writes.iter().map(|(change, _)| change));
        match &outcome {
            Ok(events) => {
                self.sequence += events.len() as u64;
                for event in events {
                    // Nobody listening is no failure.
                    let _ = self.live.send(event.clone());
                }
            }
            Err(error) => {
                tracing::error!(error = %error.message, "the journal could not be written");
                // redb refuses everything after an I/O error until the file is opened again.
                self.database = None;
            }
        }
        for (_, reply) in writes {
            // A caller that went away does not want to know.
            let _ = reply.send(outcome.as_ref().map(|_| ()).map_err(Clone::clone));
        }
    }

    fn database(&mut self) -> Result<&Database, String> {
        if self.database.is_none() {
            self.database = Some(open_database(&self.path)?);
        }
        self.database.as_ref().ok_or_else(|| "not open".into())
    }

    fn apply<'a>(&mut self, changes: impl Iterator<Item = &'a Change>) -> Result<Vec<Arc<EventRecord>>, ApiError> {
        let (mut sequence, time) = (self.sequence, self.clock.wall());
        let mut told = Vec::new();
        let path = self.path.clone();
        let refused = |reason: String| {
            let full =
                reason.contains("No space left") || reason.contains("os error 28") || reason.contains("quota exceeded");
            let code = if full { ErrorCode::DiskFull } else { ErrorCode::Internal };
            ApiError::new(code, format!("the journal {} could not be written: {reason}", path.display()))
        };
        let database = self.database().map_err(refused)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = database.begin_write()?;
            {
                let mut sandboxes = transaction.open_table(SANDBOXES)?;
                let mut events = transaction.open_table(EVENTS)?;
                let mut snapshots = transaction.open_table(SNAPSHOTS)?;
                for change in changes {
                    let draft = match change {
                        Change::Put(record, draft) => {
                            let sealed = seal(&**record).map_err(redb::Error::Corrupted)?;
                            sandboxes.insert(record.id.0.as_u128(), sealed.as_slice())?;
                            draft.as_ref()
                        }
                        Change::Remove(id, draft) => {
                            sandboxes.remove(id.0.as_u128())?;
                            Some(draft)
                        }
                        Change::Event(draft) => Some(draft),
                        Change::PutSnapshot(record, draft) => {
                            let sealed = seal(&**record).map_err(redb::Error::Corrupted)?;
                            snapshots.insert(record.name.as_str(), sealed.as_slice())?;
                            draft.as_ref()
                        }
                        Change::RemoveSnapshot(name) => {
                            snapshots.remove(name.as_str())?;
                            None
                        }
                    };
                    if let Some(draft) = draft {
                        sequence += 1;
                        let event = numbered(draft, sequence, time);
                        let sealed = seal(&event).map_err(redb::Error::Corrupted)?;
                        events.insert(sequence, sealed.as_slice())?;
                        if let Some(old) = sequence.checked_sub(EVENTS_MAX) {
                            events.remove(old)?;
                        }
                        told.push(Arc::new(event));
                    }
                }
                transaction.open_table(META)?.insert("sequence", sequence)?;
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error| refused(error.to_string()))?;
        Ok(told)
    }

    fn read(&mut self, command: Command) {
        match command {
            Command::Load(id, reply) => {
                let record = self.database().and_then(|database| load(database, id.0.as_u128()));
                let record = record.unwrap_or_else(|reason| {
                    tracing::error!(%id, reason, "a record could not be read");
                    None
                });
                let _ = reply.send(record);
            }
            Command::Snapshots(reply) => {
                let records = self.database().and_then(snapshots).unwrap_or_else(|reason| {
                    tracing::error!(reason, "the records of snapshots could not be read");
                    Vec::new()
                });
                let _ = reply.send(records);
            }
            Command::EventsAfter { sequence, limit, reply } => {
                let events = self.database().and_then(|database| events_after(database, sequence, limit));
                let _ = reply.send(events.unwrap_or_default());
            }
            // `run` takes the writes out before.
            Command::Write(..) => {}
        }
    }
}

fn numbered(draft: &EventDraft, sequence: u64, time: jiff::Timestamp) -> EventRecord {
    EventRecord {
        sequence,
        time,
        sandbox: draft.sandbox.clone(),
        sandbox_id: draft.sandbox_id,
        boot_id: draft.boot_id,
        event: draft.event.clone(),
        state: draft.state,
        cause: draft.cause,
        actor: draft.actor.clone(),
        message: draft.message.clone(),
    }
}

fn open_database(path: &Path) -> Result<Database, String> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_LEN).set_concurrency_mode(ConcurrencyMode::SingleWriter);
    builder.create(path).map_err(|error| error.to_string())
}

/// Whether a refusal to open means that the bytes are wrong, and not that somebody has the file or the disk is ill.
fn is_damage(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    ["corrupt", "magic", "checksum", "invalid data", "not a valid"].iter().any(|word| reason.contains(word))
}

fn schema_of(database: &Database) -> Result<Option<u64>, String> {
    let transaction = database.begin_read().map_err(|error| error.to_string())?;
    match transaction.open_table(META) {
        Ok(table) => Ok(table.get("schema").map_err(|error| error.to_string())?.map(|value| value.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// Migrates, makes the tables, moves damaged records away, and gives the last sequence number.
fn prepare(database: &Database, schema: u64, migrations: &[Migration], found: &mut Found) -> Result<u64, String> {
    let text = |error: redb::Error| error.to_string();
    let transaction = database.begin_write().map_err(|error| error.to_string())?;
    for migration in migrations.iter().skip(usize::try_from(schema - 1).unwrap_or(usize::MAX)) {
        migration(&transaction)?;
    }
    let sequence = (|| -> Result<u64, redb::Error> {
        let mut meta = transaction.open_table(META)?;
        meta.insert("schema", migrations.len() as u64 + 1)?;
        let sequence = meta.get("sequence")?.map_or(0, |value| value.value());
        let mut sandboxes = transaction.open_table(SANDBOXES)?;
        let mut quarantine = transaction.open_table(QUARANTINE)?;
        transaction.open_table(EVENTS)?;
        let mut damaged = Vec::new();
        for row in sandboxes.iter()? {
            let (key, value) = row?;
            match unseal::<SandboxRecord>(value.value()) {
                Ok(record) => found.records.push(record),
                Err(reason) => damaged.push((key.value(), value.value().to_vec(), reason)),
            }
        }
        for (key, bytes, reason) in damaged {
            let id = uuid::Uuid::from_u128(key);
            found
                .problems
                .push(format!("the record of sandbox {id} is damaged ({reason}); it was put into quarantine"));
            quarantine.insert(key, bytes.as_slice())?;
            sandboxes.remove(key)?;
        }
        let mut snapshots = transaction.open_table(SNAPSHOTS)?;
        let mut damaged = Vec::new();
        for row in snapshots.iter()? {
            let (key, value) = row?;
            if let Err(reason) = unseal::<SnapshotRecord>(value.value()) {
                damaged.push((key.value().to_owned(), reason));
            }
        }
        for (name, reason) in damaged {
            // Its files say everything again that the record did.
            found.problems.push(format!("the record of snapshot {name} is damaged ({reason}) and was dropped"));
            snapshots.remove(name.as_str())?;
        }
        Ok(sequence)
    })()
    .map_err(text)?;
    transaction.commit().map_err(|error| error.to_string())?;
    Ok(sequence)
}

fn load(database: &Database, key: u128) -> Result<Option<SandboxRecord>, String> {
    let transaction = database.begin_read().map_err(|error| error.to_string())?;
    let table = transaction.open_table(SANDBOXES).map_err(|error| error.to_string())?;
    let row = table.get(key).map_err(|error| error.to_string())?;
    row.map(|value| unseal(value.value())).transpose()
}

fn snapshots(database: &Database) -> Result<Vec<SnapshotRecord>, String> {
    let transaction = database.begin_read().map_err(|error| error.to_string())?;
    let table = transaction.open_table(SNAPSHOTS).map_err(|error| error.to_string())?;
    let rows = table.iter().map_err(|error| error.to_string())?;
    rows.map(|row| unseal(row.map_err(|error| error.to_string())?.1.value())).collect()
}

fn events_after(database: &Database, sequence: u64, limit: usize) -> Result<Vec<EventRecord>, String> {
    let transaction = database.begin_read().map_err(|error| error.to_string())?;
    let table = transaction.open_table(EVENTS).map_err(|error| error.to_string())?;
    let rows = table.range(sequence.saturating_add(1)..).map_err(|error| error.to_string())?;
    // An event that cannot be read is left out; the gap in the numbers shows it.
    Ok(rows.take(limit).filter_map(|row| unseal(row.ok()?.1.value()).ok()).collect())
}

#[cfg(test)]
pub(super) fn damage(path: &Path, id: msb_protocol::id::SandboxId) {
    let database = open_database(path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(SANDBOXES).unwrap();
        let mut bytes = table.get(id.0.as_u128()).unwrap().unwrap().value().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        table.insert(id.0.as_u128(), bytes.as_slice()).unwrap();
    }
    transaction.commit().unwrap();
}
