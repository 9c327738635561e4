//! The bound on what this node holds for clients: commands and their bytes.
//!
//! A command holds its place from the moment it is taken until its client is answered, whether it
//! waits for a leader or for its commit. At the bound new commands are refused at once and nothing
//! was sent, so "not applied" is certain.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of one unit of the byte budget: a semaphore holds 32-bit amounts, and a command is never
/// counted as less than this.
const UNIT_BYTES: usize = 64;

/// The places. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Park {
    commands: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    commands_max: usize,
    units_max: usize,
}

/// One command's place; given back when dropped.
#[derive(Debug)]
pub struct Place {
    _command: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

impl Park {
    /// A park for this many commands and bytes.
    pub fn new(commands_max: usize, bytes_max: usize) -> Park {
        let commands_max = commands_max.min(Semaphore::MAX_PERMITS);
        let units_max = bytes_max.div_ceil(UNIT_BYTES).min(Semaphore::MAX_PERMITS);
        Park {
            commands: Arc::new(Semaphore::new(commands_max)),
            bytes: Arc::new(Semaphore::new(units_max)),
            commands_max,
            units_max,
        }
    }

    /// A place for a command of `bytes`, or why there is none.
    pub fn enter(&self, bytes: usize) -> Result<Place, String> {
        let full = || {
            format!(
                "this node holds {} commands with about {} bytes, and takes at most {} commands and {} bytes",
                self.commands_held(),
                self.bytes_held(),
                self.commands_max,
                self.units_max * UNIT_BYTES
            )
        };
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES).max(1)).map_err(|_| full())?;
        let command = Arc::clone(&self.commands).try_acquire_owned().map_err(|_| full())?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(units).map_err(|_| full())?;
        Ok(Place { _command: command, _bytes: bytes })
    }

    /// Commands held now.
    pub fn commands_held(&self) -> usize {
        self.commands_max.saturating_sub(self.commands.available_permits())
    }

    /// Bytes held now, rounded up for each command.
    pub fn bytes_held(&self) -> usize {
        self.units_max.saturating_sub(self.bytes.available_permits()) * UNIT_BYTES
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn either_bound_refuses_and_a_dropped_place_is_free_again() {
        let park = Park::new(2, 1_024);
        let one = park.enter(1_000).unwrap();
        assert!(park.enter(100).unwrap_err().contains("1024"));
        let two = park.enter(10).err();
        assert!(two.is_some());
        drop(one);
        let _a = park.enter(1).unwrap();
        let _b = park.enter(1).unwrap();
        assert!(park.enter(1).is_err());
        assert_eq!((park.commands_held(), park.bytes_held()), (2, 128));
    }

    #[test]
    fn a_refused_command_keeps_no_part_of_a_place() {
        let park = Park::new(5, 128);
        for _ in 0..10 {
            assert!(park.enter(4_096).is_err());
        }
        assert_eq!((park.commands_held(), park.bytes_held()), (0, 0));
    }
}
