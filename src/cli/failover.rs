//! `stemedb failover [--to NODE]`: moves leadership, and says who leads then.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::flow_client::{self, OrderArgs, Ordered};
use super::http_client::Call;
use super::{CliError, output};

/// Arguments of `stemedb failover`.
#[derive(Args, Debug, Clone)]
pub struct FailoverArgs {
    /// Name of the next leader; default: the voter that lacks least
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    #[command(flatten)]
    order: OrderArgs,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Plan {
    from: String,
    to: String,
    /// Older programs plan only what would be allowed.
    allowed: Option<bool>,
    detail: String,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Candidate {
    name: String,
    fit: bool,
    why_not: Option<String>,
    lag_entries: Option<u64>,
    lag_bytes: Option<u64>,
}

/// Runs `stemedb failover`.
pub async fn run(args: &FailoverArgs) -> Result<(), CliError> {
    let body = serde_json::json!({ "target": args.to }).to_string();
    let call = Call::post(format!("/v1/admin/failover?{}", args.order.query()), body);
    let job = match args.order.send(&call).await? {
        Ordered::Job(job) => job,
        Ordered::Plan(answer) => {
            let plan: Plan = answer.json().map_err(CliError::Unreachable)?;
            if args.order.json {
                output::json(&plan)?;
            } else {
                output::line(&text(&plan))?;
            }
            return match plan.allowed.unwrap_or(true) {
                true => Ok(()),
                false => Err(CliError::Found("it would be refused".to_owned())),
            };
        }
    };
    flow_client::show(&job, args.order.json)?;
    match (&args.to, &job.to) {
        (Some(wanted), Some(leads)) if wanted != leads => {
            Err(CliError::Found(format!("{wanted} did not take leadership over; {leads} leads")))
        }
        _ => Ok(()),
    }
}

fn text(plan: &Plan) -> String {
    let mut table = output::table(["NODE", "FIT", "LAG", "WHY NOT"]);
    for candidate in &plan.candidates {
        let lag = match (candidate.lag_entries, candidate.lag_bytes) {
            (Some(entries), Some(bytes)) => format!("{entries} entries, {bytes} B"),
            _ => "-".to_owned(),
        };
        let fit = if candidate.fit { "yes" } else { "no" };
        table.add_row([candidate.name.as_str(), fit, &lag, candidate.why_not.as_deref().unwrap_or("")]);
    }
    format!("{table}\n{}.", plan.detail)
}
