//! `scripts/failover-drill.sh` with a program in place of stemedb: what cron sees of it, and what it keeps.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use tokio::time::Instant;

/// Writes its report and ends as it is told, with one line on each output; or ends without a report; or waits for a signal.
const STAND_IN: &str = r#"#!/bin/sh
echo "$@" >>"$STAND_IN_SAW"
case "$STAND_IN_ENDS" in
    mute) exit 3 ;;
    killed) echo "no memory" >&2; kill -9 $$ ;;
    waits)
        trap 'echo "put back" >&2; exit 5' TERM
        : >"$STAND_IN_SAW.waits"
        while :; do sleep 0.05; done ;;
esac
while [ $# -gt 0 ]; do
    [ "$1" = --html ] && echo page >"$2"
    shift
done
echo '{}'
echo "what it says" >&2
exit "$STAND_IN_ENDS"
"#;

struct Ground {
    dir: tempfile::TempDir,
    reports: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("stand-in");
        std::fs::write(&program, STAND_IN).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let reports = dir.path().join("a folder of reports");
        Self { dir, reports }
    }

    fn run(&self, ends: &str, args: &[&str]) -> Output {
        self.command(ends, args).output().unwrap()
    }

    fn command(&self, ends: &str, args: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/failover-drill.sh"));
        command
            .args(args)
            .env("STEMEDB", self.dir.path().join("stand-in"))
            .env("STAND_IN_SAW", self.dir.path().join("saw"))
            .env("STAND_IN_ENDS", ends)
            .env("DRILL_REPORTS", &self.reports)
            .env("DRILL_KEEP", "2")
            .stdin(Stdio::null());
        command
    }

    /// Names of files, the links to the newest left out.
    fn kept(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.reports).unwrap().map(|entry| entry.unwrap());
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("20")).collect();
        names.sort();
        names
    }

    fn saw(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("saw")).unwrap()
    }
}

#[test]
fn success_is_silent_and_a_finding_is_told_with_its_report() {
    let ground = Ground::new();
    let well = ground.run("0", &[]);
    assert_eq!((well.status.code(), well.stdout.as_slice(), well.stderr.as_slice()), (Some(0), &b""[..], &b""[..]));
    assert!(ground.saw().starts_with("drill --kind all --json --html "), "{}", ground.saw());
    assert_eq!(std::fs::read_to_string(ground.reports.join("latest.json")).unwrap(), "{}\n");
    let ill = ground.run("1", &["--kind", "drain", "--behind", "nginx"]);
    let text = String::from_utf8(ill.stdout).unwrap();
    assert_eq!(ill.status.code(), Some(1));
    assert!(text.contains("what it says") && text.contains(".html"), "{text}");
    assert!(ground.saw().contains("drill --kind drain --behind nginx --json"), "{}", ground.saw());
}

#[test]
fn a_run_without_a_report_is_not_shown_with_that_of_an_earlier_one() {
    let ground = Ground::new();
    assert_eq!(ground.run("0", &[]).status.code(), Some(0));
    assert!(ground.reports.join("latest.html").exists());
    assert_eq!(ground.run("mute", &[]).status.code(), Some(3));
    for kind in ["html", "json"] {
        let shown = std::fs::symlink_metadata(ground.reports.join(format!("latest.{kind}")));
        assert!(shown.is_err(), "latest.{kind} is there");
    }
    assert!(ground.reports.join("latest.log").exists());
}

#[test]
fn a_drill_that_was_killed_is_told_with_what_it_said() {
    let ground = Ground::new();
    for (ends, code) in [("killed", 137), ("141", 141)] {
        let told = ground.run(ends, &[]);
        assert_eq!(told.status.code(), Some(code), "{told:?}");
        let said = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(said.contains("no memory") || said.contains("what it says"), "{said}");
    }
}

#[test]
fn a_signal_is_handed_on_and_the_end_of_the_drill_waited_for() {
    let ground = Ground::new();
    let mut running = ground.command("waits", &[]).stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ground.dir.path().join("saw.waits").exists() {
        assert!(Instant::now() < deadline, "in vain: the program started");
        assert!(running.try_wait().unwrap().is_none(), "the script has ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    let script = rustix::process::Pid::from_child(&running);
    rustix::process::kill_process(script, rustix::process::Signal::TERM).unwrap();
    let ended = running.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&ended.stdout).contains("put back"), "{ended:?}");
}

#[test]
fn the_oldest_reports_go_first_and_nothing_else_goes() {
    let ground = Ground::new();
    std::fs::create_dir_all(&ground.reports).unwrap();
    for name in ["20260101T000000Z", "20260102T000000Z", "20260103T000000Z"] {
        for kind in ["html", "json", "log"] {
            File::create(ground.reports.join(format!("{name}.{kind}"))).unwrap();
        }
    }
    File::create(ground.reports.join("notes.log")).unwrap();
    assert_eq!(ground.run("0", &[]).status.code(), Some(0));
    let kept = ground.kept();
    assert_eq!(kept.len(), 6, "{kept:?}");
    assert_eq!(kept[0], "20260103T000000Z.html");
    assert!(ground.reports.join("notes.log").exists());
}

#[test]
fn two_do_not_overlap() {
    let ground = Ground::new();
    std::fs::create_dir_all(&ground.reports).unwrap();
    let held = File::create(ground.reports.join("lock")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let second = ground.run("0", &[]);
    assert_eq!(second.status.code(), Some(75));
    assert!(String::from_utf8_lossy(&second.stderr).contains("under way"), "{second:?}");
    assert!(ground.kept().is_empty());
    drop(held);
    assert_eq!(ground.run("0", &[]).status.code(), Some(0));
}
