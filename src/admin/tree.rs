//! The replacement of a damaged tree by a checkpoint of a replica: which step comes next.
//!
//! ```text
//!            log, vote and core go on                    the node answers through others
//!  Begin ─► Probe ─► Pull ─► Check ─────────────────► EndCore ─► Replace ─► Start ─► Finish
//!                     ▲        │ behind: again                       │
//!                     └────────┘                                     ▼ the log does not fit it
//!                                                              RebuildNode
//! ```
//!
//! Log, vote and Raft id stay, so that no permit is needed and no copy of an entry is given up: the old tree is of no
//! use, and it goes only once the new one is whole. What has been fetched is all that a killed process finds again: it
//! begins anew, and every step may be carried out again.

/// Replacements within a day after which the disk is taken for worse than a damaged tree: then the whole node is
/// rebuilt, which has a limit of its own.
pub const REPLACEMENTS_MAX: usize = 3;

/// How the fetched checkpoint and the log of this node go together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fit {
    /// Nobody has looked.
    #[default]
    Unknown,
    /// The log goes on where the checkpoint ends, or ends before it.
    Fits,
    /// They are of different histories.
    Not,
}

/// What the runner sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// Whether the tree is damaged.
    pub needed: bool,
    /// Whether there is no other node.
    pub alone: bool,
    /// Whether the node may do this by itself, by its configuration.
    pub automatic: bool,
    /// Whether a replacement was begun.
    pub begun: bool,
    /// Whether the tree was replaced too often lately, or its successor does not start.
    pub hopeless: bool,
    /// Whether the data folder has just taken a file, kept it and given it back.
    pub folder_good: bool,
    /// Whether every file of a checkpoint is here.
    pub pulled: bool,
    /// Whether that one may take the tree's place.
    pub fit: Fit,
    /// Whether the log is open in this process or a core runs on it.
    pub core_open: bool,
    /// Whether the new tree is in place.
    pub replaced: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Nothing, until an operator asks for a rebuild.
    AwaitOperator,
    /// Begin.
    Begin,
    /// Try the folder.
    Probe,
    /// Fetch a checkpoint.
    Pull,
    /// Look whether the log fits it.
    Check,
    /// End the core and close the log.
    EndCore,
    /// Put the new tree in the place of the old one.
    Replace,
    /// Start the next incarnation.
    Start,
    /// It is done.
    Finish,
    /// Rebuild the whole node instead.
    RebuildNode,
}

/// The next step. Pure.
pub fn next(view: &View) -> Step {
    match *view {
        View { begun: true, hopeless: true, .. } => Step::RebuildNode,
        View { begun: true, replaced: true, core_open: false, .. } => Step::Start,
        View { begun: true, replaced: true, .. } => Step::Finish,
        // Something else has replaced it: a checkpoint that the leader sent.
        View { begun: true, needed: false, .. } => Step::Finish,
        View { needed: false, .. } | View { alone: true, .. } => Step::Rest,
        View { automatic: false, .. } => Step::AwaitOperator,
        View { begun: false, .. } => Step::Begin,
        View { folder_good: false, .. } => Step::Probe,
        View { pulled: false, .. } => Step::Pull,
        View { fit: Fit::Unknown, .. } => Step::Check,
        View { fit: Fit::Not, .. } => Step::RebuildNode,
        View { core_open: true, .. } => Step::EndCore,
        _ => Step::Replace,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views() -> impl Iterator<Item = View> {
        [Fit::Unknown, Fit::Fits, Fit::Not].into_iter().flat_map(|fit| {
            (0..512u32).map(move |bits| View {
                needed: bits & 1 != 0,
                alone: bits & 2 != 0,
                automatic: bits & 4 != 0,
                begun: bits & 8 != 0,
                hopeless: bits & 16 != 0,
                folder_good: bits & 32 != 0,
                pulled: bits & 64 != 0,
                core_open: bits & 128 != 0,
                replaced: bits & 256 != 0,
                fit,
            })
        })
    }

    #[test]
    fn every_view_keeps_the_rules_that_protect_data() {
        for view in views() {
            let step = next(&view);
            if step == Step::Replace {
                assert!(!view.core_open, "no core runs on a tree that is replaced: {view:?}");
            }
            if matches!(step, Step::EndCore | Step::Replace) {
                assert!(view.needed && view.pulled && view.folder_good, "the core runs until all is here: {view:?}");
                assert!(view.fit == Fit::Fits && !view.replaced && !view.hopeless, "{view:?}");
            }
            if matches!(step, Step::Begin | Step::Pull) {
                assert!(view.automatic && view.needed && !view.alone, "{view:?}");
            }
            if step == Step::Start {
                assert!(view.replaced && !view.core_open, "{view:?}");
            }
            if step == Step::RebuildNode {
                assert!(view.begun, "{view:?}");
            }
        }
    }

    #[test]
    fn a_replacement_that_goes_well_takes_each_step_once_in_order() {
        let mut view = View { needed: true, automatic: true, core_open: true, ..View::default() };
        let mut steps = Vec::new();
        loop {
            let step = next(&view);
            steps.push(step);
            match step {
                Step::Begin => view.begun = true,
                Step::Probe => view.folder_good = true,
                Step::Pull => view.pulled = true,
                Step::Check => view.fit = Fit::Fits,
                Step::EndCore => view.core_open = false,
                Step::Replace => view.replaced = true,
                Step::Start => (view.core_open, view.needed) = (true, false),
                Step::Finish => view.begun = false,
                Step::Rest => break,
                Step::AwaitOperator | Step::RebuildNode => unreachable!("{view:?}"),
            }
        }
        use Step::*;
        assert_eq!(steps, [Begin, Probe, Pull, Check, EndCore, Replace, Start, Finish, Rest]);
    }
}
