//! Which of several assertions about the same concept and predicate is the answer.
//!
//! Pure: the query hands in what each candidate has to show and keeps the best.

use std::cmp::Ordering;
use std::str::FromStr;

use super::validate::Invalid;

/// How a query picks per concept and predicate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Resolve {
    /// The highest index among what is not superseded.
    #[default]
    Latest,
    /// The highest sum of weights, then the latest.
    Votes,
    /// The highest confidence, then the latest; none counts as less than 0.
    Confidence,
    /// Everything, superseded ones marked.
    All,
}

impl Resolve {
    /// The word used in queries.
    pub fn as_str(self) -> &'static str {
        match self {
            Resolve::Latest => "latest",
            Resolve::Votes => "votes",
            Resolve::Confidence => "confidence",
            Resolve::All => "all",
        }
    }
}

impl FromStr for Resolve {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        [Resolve::Latest, Resolve::Votes, Resolve::Confidence, Resolve::All]
            .into_iter()
            .find(|resolve| resolve.as_str() == text)
            .ok_or_else(|| {
                Invalid::malformed("resolve", format!("is `{text}`; accepted are latest, votes, confidence and all"))
            })
    }
}

/// What a candidate has to show.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Sequence number of the assertion.
    pub index: u64,
    /// Sum of weights, in billionths.
    pub votes_sum_nano: i64,
    /// Confidence, when given.
    pub confidence: Option<f64>,
}

/// `Greater` when `a` is the better answer.
pub fn compare(resolve: Resolve, a: &Standing, b: &Standing) -> Ordering {
    let first = match resolve {
        Resolve::Latest | Resolve::All => Ordering::Equal,
        Resolve::Votes => a.votes_sum_nano.cmp(&b.votes_sum_nano),
        Resolve::Confidence => match (a.confidence, b.confidence) {
            (Some(a), Some(b)) => a.total_cmp(&b),
            (a, b) => a.is_some().cmp(&b.is_some()),
        },
    };
    first.then(a.index.cmp(&b.index))
}
