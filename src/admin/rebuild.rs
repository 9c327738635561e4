//! The rebuild of a node from a replica: which step comes next.
//!
//! ```text
//!  Begin ─► EndCore ─► Ask ─► Pull ─► Ask ─► Swap ─► Start ─► Join ─► Promote ─► (done)
//!   │ the folder passed    │ the permit     │ looked at again: the old files are the last
//!   ▼ a probe              ▼ is held        ▼ thing to be given up
//!  Asking ───────────────► Granted ─► Pulled ─► Swapping ─► Emptied ─► Installed      durable
//! ```
//!
//! The phase is durable before its step begins, so that a killed process goes on with the same step. Every step may
//! be carried out again. No Raft core runs under the old id from `Asking` on.

/// How far a rebuild has come, as it is kept on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The core has ended or is about to; there is no permit yet.
    #[default]
    Asking,
    /// The permit is held; files are being fetched.
    Granted,
    /// Every file is here.
    Pulled,
    /// The old files are being put away.
    Swapping,
    /// They are; the new ones are being put in place.
    Emptied,
    /// Log, tree and identity are in place under the fresh id.
    Installed,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Phase; 6] =
        [Phase::Asking, Phase::Granted, Phase::Pulled, Phase::Swapping, Phase::Emptied, Phase::Installed];

    /// Its word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Asking => "asking",
            Phase::Granted => "granted",
            Phase::Pulled => "pulled",
            Phase::Swapping => "swapping",
            Phase::Emptied => "emptied",
            Phase::Installed => "installed",
        }
    }

    /// The phase of a word.
    pub fn of(word: &str) -> Option<Phase> {
        Phase::ALL.into_iter().find(|phase| phase.word() == word)
    }
}

/// What the runner sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// The phase of the rebuild that was begun; `None`: none was.
    pub phase: Option<Phase>,
    /// Whether something is wrong that a rebuild cures: a failed disk, a lost log, an emptied folder.
    pub needed: bool,
    /// Whether an operator has asked for it.
    pub ordered: bool,
    /// Whether the node may begin by itself, by its configuration.
    pub automatic: bool,
    /// The cluster has said that an operator must decide, and none has since.
    pub operator_decides: bool,
    /// Whether the data folder has just taken a file, kept it and given it back.
    pub folder_good: bool,
    /// Whether the log is open in this process or a core runs on it.
    pub core_open: bool,
    /// Whether the leader was asked after the files had come.
    pub looked_again: bool,
    /// Whether the leader sends the log to the fresh id.
    pub joined: bool,
    /// The permit belongs to somebody else by now.
    pub stale: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Nothing, until an operator asks for it.
    AwaitOperator,
    /// Try the folder.
    Probe,
    /// Begin: note it on the disk.
    Begin,
    /// End the core and close the log.
    EndCore,
    /// Ask the leader for the permit, or whether it still stands.
    Ask,
    /// Fetch a checkpoint.
    Pull,
    /// Put the old files away and the new ones in place.
    Swap,
    /// Start the next incarnation.
    Start,
    /// Have the leader send the log.
    Join,
    /// Have the fresh id vote in the place of the old one.
    Promote,
    /// Begin again under another permit.
    StartOver,
}

/// The next step. Pure.
pub fn next(view: &View) -> Step {
    let Some(phase) = view.phase else {
        return match view {
            View { ordered: false, needed: false, .. } => Step::Rest,
            View { ordered: false, automatic: false, .. } | View { ordered: false, operator_decides: true, .. } => {
                Step::AwaitOperator
            }
            View { folder_good: false, .. } => Step::Probe,
            _ => Step::Begin,
        };
    };
    match phase {
        Phase::Installed if view.stale => Step::StartOver,
        Phase::Installed if !view.core_open => Step::Start,
        Phase::Installed if !view.joined => Step::Join,
        Phase::Installed => Step::Promote,
        _ if view.core_open => Step::EndCore,
        Phase::Asking if view.operator_decides && !view.ordered => Step::AwaitOperator,
        Phase::Asking => Step::Ask,
        Phase::Granted => Step::Pull,
        Phase::Pulled if !view.looked_again => Step::Ask,
        Phase::Pulled | Phase::Swapping | Phase::Emptied => Step::Swap,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views() -> impl Iterator<Item = View> {
        let phases = std::iter::once(None).chain(Phase::ALL.into_iter().map(Some));
        phases.flat_map(|phase| {
            (0..512u32).map(move |bits| View {
                phase,
                needed: bits & 1 != 0,
                ordered: bits & 2 != 0,
                automatic: bits & 4 != 0,
                operator_decides: bits & 8 != 0,
                folder_good: bits & 16 != 0,
                core_open: bits & 32 != 0,
                looked_again: bits & 64 != 0,
                joined: bits & 128 != 0,
                stale: bits & 256 != 0,
            })
        })
    }

    #[test]
    fn every_view_keeps_the_rules_that_protect_data() {
        for view in views() {
            let step = next(&view);
            if matches!(step, Step::Ask | Step::Pull | Step::Swap | Step::Start) {
                assert!(!view.core_open, "no core runs while {step:?} is done: {view:?}");
            }
            if step == Step::Swap {
                let last_look = view.looked_again || view.phase > Some(Phase::Pulled);
                assert!(last_look, "the old files are kept until the leader was asked again: {view:?}");
                assert!(view.phase >= Some(Phase::Pulled), "and until everything has come: {view:?}");
            }
            if step == Step::Begin {
                assert!(
                    view.folder_good && (view.ordered || (view.needed && view.automatic && !view.operator_decides))
                );
            }
            if matches!(step, Step::Join | Step::Promote) {
                assert!(view.phase == Some(Phase::Installed) && view.core_open && !view.stale);
            }
            if step == Step::Promote {
                assert!(view.joined);
            }
        }
    }

    #[test]
    fn a_rebuild_that_goes_well_takes_each_step_once_in_order() {
        let mut view = View { needed: true, automatic: true, core_open: true, ..View::default() };
        let mut steps = Vec::new();
        loop {
            let step = next(&view);
            steps.push(step);
            match step {
                Step::Probe => view.folder_good = true,
                Step::Begin => view.phase = Some(Phase::Asking),
                Step::EndCore => view.core_open = false,
                Step::Ask if view.phase == Some(Phase::Asking) => view.phase = Some(Phase::Granted),
                Step::Ask => view.looked_again = true,
                Step::Pull => view.phase = Some(Phase::Pulled),
                Step::Swap => view.phase = Some(Phase::Installed),
                Step::Start => (view.core_open, view.needed) = (true, false),
                Step::Join => view.joined = true,
                Step::Promote => view.phase = None,
                Step::Rest => break,
                Step::AwaitOperator | Step::StartOver => unreachable!("{view:?}"),
            }
        }
        use Step::*;
        assert_eq!(steps, [Probe, Begin, EndCore, Ask, Pull, Ask, Swap, Start, Join, Promote, Rest]);
    }

    #[test]
    fn a_word_stands_for_its_phase() {
        for phase in Phase::ALL {
            assert_eq!(Phase::of(phase.word()), Some(phase));
        }
        assert_eq!(Phase::of("done"), None);
    }
}
