//! `stemedb failover [--to NODE]`: moves leadership, and says who leads then.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::http_client::Call;
use super::{CliError, EndpointArgs, flow_client, output};

/// Arguments of `stemedb failover`.
#[derive(Args, Debug, Clone)]
pub struct FailoverArgs {
    /// Name of the next leader; default: the voter that lacks least
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Only say who could take over
    #[arg(long)]
    dry_run: bool,
    /// Do not wait for the end
    #[arg(long)]
    no_wait: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Plan {
    from: String,
    to: String,
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
    let endpoints = args.endpoints.parse()?;
    let body = serde_json::json!({ "target": args.to }).to_string();
    let call = Call::post(format!("/v1/admin/failover?dry_run={}&wait={}", args.dry_run, !args.no_wait), body);
    let (mut client, answer) = flow_client::order(&endpoints, &call).await?;
    if args.dry_run {
        let plan: Plan = answer.json().map_err(CliError::Unreachable)?;
        return if args.json { output::json(&plan) } else { output::line(&text(&plan)) };
    }
    let job = flow_client::follow(&mut client, &answer, !args.no_wait).await?;
    flow_client::show(&job, args.json)?;
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
    format!("{table}\nLeadership would go from {} to {}.", plan.from, plan.to)
}
