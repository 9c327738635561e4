//! What operators, and nodes by themselves, do to a cluster: each flow a pure function from what is seen to the next
//! step. Runners in `node` carry the steps out.

pub mod drain;
pub mod failover;
pub mod member;
pub mod rebuild;
pub mod tree;
