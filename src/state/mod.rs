//! The replicated state: commands, their application, and the tree that holds the result.
pub mod apply;
pub mod command;
pub mod engine;
pub mod key_table;
pub mod keys;
pub mod level;
pub mod machine;
pub mod members;
pub mod outcome_record;
pub mod permits;
pub mod record;

#[cfg(test)]
pub(crate) mod test_support;
