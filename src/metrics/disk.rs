//! How much room there is on the disk of the data folder.

use prometheus::IntGauge;

use super::Metrics;
use super::register::Register;
use super::wal::gauge;
use crate::node::space::Space;

pub(super) struct DiskMetrics {
    free_bytes: IntGauge,
    free_inodes: IntGauge,
    low_water_bytes: IntGauge,
    ballast_bytes: IntGauge,
}

impl DiskMetrics {
    pub(super) fn new(register: &mut Register) -> Self {
        DiskMetrics {
            free_bytes: register
                .gauge("stemedb_disk_free_bytes", "Bytes that may still be written on the disk of the data folder."),
            free_inodes: register.gauge(
                "stemedb_disk_free_inodes",
                "Files that may still be made there; -1 where the file system has no such number.",
            ),
            low_water_bytes: register
                .gauge("stemedb_disk_low_water_bytes", "Free bytes below which writes of clients are refused."),
            ballast_bytes: register
                .gauge("stemedb_disk_ballast_bytes", "Bytes kept by the file ballast for a full disk."),
        }
    }
}

impl Metrics {
    /// What there is on the disk of the data folder.
    pub fn set_space(&self, space: &Space, ballast_bytes: u64, low_water_bytes: u64) {
        let disk = &self.disk;
        disk.free_bytes.set(gauge(space.bytes_free));
        disk.free_inodes.set(if space.inodes_total == 0 { -1 } else { gauge(space.inodes_free) });
        disk.ballast_bytes.set(gauge(ballast_bytes));
        disk.low_water_bytes.set(gauge(low_water_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::value;

    #[test]
    fn room_arrives_under_its_names() {
        let metrics = Metrics::new();
        let space = Space { bytes_free: 7, bytes_total: 100, inodes_free: 5, inodes_total: 9 };
        metrics.set_space(&space, 3, 10);
        for (name, expected) in [
            ("stemedb_disk_free_bytes", 7.0),
            ("stemedb_disk_free_inodes", 5.0),
            ("stemedb_disk_low_water_bytes", 10.0),
            ("stemedb_disk_ballast_bytes", 3.0),
        ] {
            assert_eq!(value(&metrics, name), expected, "{name}");
        }
        metrics.set_space(&Space { inodes_free: u64::MAX, inodes_total: 0, ..space }, 3, 10);
        assert_eq!(value(&metrics, "stemedb_disk_free_inodes"), -1.0);
    }
}
