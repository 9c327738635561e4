//! How Raft is set up.

use openraft::SnapshotPolicy;

use super::start::StartError;
use crate::config::Config;

/// Entries in one append. Replication of many small entries is bounded by messages, not bytes; the log
/// bounds the bytes of what it hands out.
const APPEND_ENTRIES_MAX: u64 = 4_096;

/// Waits between attempts to replicate to a node that cannot be reached: short at first, since a
/// restarted process is back within a second.
const REPLICATION_BACKOFF: &str = "20ms 40ms 80ms ...400ms";

/// Settings of Raft; each that differs from openraft's default has its reason in `openraft.md` or here.
pub fn raft_config(config: &Config) -> Result<openraft::Config, StartError> {
    let cluster = &config.cluster;
    let settings = openraft::Config {
        cluster_name: "stemedb".into(),
        heartbeat_interval: cluster.heartbeat_ms,
        election_timeout_min: cluster.election_min_ms,
        election_timeout_max: cluster.election_max_ms,
        max_payload_entries: APPEND_ENTRIES_MAX,
        // Checkpoints and purges are asked for by bytes, in `upkeep`.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // A transfer times each of its messages; openraft's own bound would end a large one.
        install_snapshot_timeout: u64::from(u32::MAX),
        enable_pre_vote: Some(true),
        // A leader that restores itself may give another content to a log id that followers hold.
        enable_leader_restore: Some(false),
        // A follower that lost its log must never be taken back silently.
        allow_log_reversion: Some(false),
        quorum_loss_probe_interval: Some(cluster.election_max_ms.saturating_mul(2)),
        backoff: REPLICATION_BACKOFF.into(),
        ..openraft::Config::default()
    };
    settings.validate().map_err(|e| StartError::Config(format!("cluster: {e}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_settings_of_raft_that_protect_data_are_set() {
        let settings = raft_config(&Config::default()).unwrap();
        assert_eq!(settings.enable_leader_restore, Some(false));
        assert_eq!(settings.enable_pre_vote, Some(true));
        assert_eq!(settings.allow_log_reversion, Some(false));
        assert_eq!(settings.snapshot_policy, SnapshotPolicy::Never);
        assert!(settings.quorum_loss_probe_interval >= Some(2 * settings.election_timeout_max));
        assert_eq!(
            (settings.heartbeat_interval, settings.election_timeout_min, settings.election_timeout_max),
            (50, 150, 300)
        );
    }

    #[test]
    fn impossible_clocks_are_refused() {
        let mut config = Config::default();
        config.cluster.election_min_ms = 400;
        assert!(matches!(raft_config(&config), Err(StartError::Config(_))));
    }
}
