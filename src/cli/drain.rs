//! `stemedb drain NODE` and `undrain NODE`: out of traffic, and back into it.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::flow_client::{self, OrderArgs, Ordered};
use super::http_client::{Call, Endpoint, encode_query};
use super::{CliError, EndpointArgs, output};

/// Arguments of `stemedb drain`.
#[derive(Args, Debug, Clone)]
pub struct DrainArgs {
    /// Name of the node; may be left out with a single endpoint
    node: Option<String>,
    /// Stay drained after a restart, until `undrain`
    #[arg(long)]
    persist: bool,
    /// Also while another node is drained, or when the others could not go on alone
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Arguments of `stemedb undrain`.
#[derive(Args, Debug, Clone)]
pub struct UndrainArgs {
    /// Name of the node; may be left out with a single endpoint
    node: Option<String>,
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Plan {
    node: String,
    allowed: bool,
    detail: String,
    held_by: Option<String>,
    leads: bool,
    tolerance: serde_json::Value,
}

/// `node=NAME`; nothing for the only endpoint itself.
fn query(node: Option<&str>, endpoints: &[Endpoint]) -> Result<String, CliError> {
    match (node, endpoints.len()) {
        (Some(node), _) => Ok(format!("node={}&", encode_query(node))),
        (None, 1) => Ok(String::new()),
        (None, _) => Err(CliError::Usage(
            "name the node, or give it as the only endpoint: `stemedb status` shows the names".to_owned(),
        )),
    }
}

/// Runs `stemedb drain`.
pub async fn run(args: &DrainArgs) -> Result<(), CliError> {
    let query = query(args.node.as_deref(), &args.order.endpoints.parse()?)?;
    let body = serde_json::json!({ "persist": args.persist }).to_string();
    let call = Call::post(format!("/v1/admin/node/drain?{query}force={}&{}", args.force, args.order.query()), body);
    let answer = match args.order.send(&call).await? {
        Ordered::Job(job) => return flow_client::show(&job, args.order.json),
        Ordered::Plan(answer) => answer,
    };
    let plan: Plan = answer.json().map_err(CliError::Unreachable)?;
    if args.order.json {
        output::json(&plan)?;
    } else {
        let leads = if plan.leads { " It leads, so leadership would move." } else { "" };
        output::line(&format!("{}: {}.{leads}", plan.node, plan.detail))?;
    }
    match plan.allowed {
        true => Ok(()),
        false => Err(CliError::Found("it would be refused; --force would do it all the same".to_owned())),
    }
}

/// Runs `stemedb undrain`.
pub async fn run_undrain(args: &UndrainArgs) -> Result<(), CliError> {
    let endpoints = args.endpoints.parse()?;
    let query = query(args.node.as_deref(), &endpoints)?;
    let call = Call::post(format!("/v1/admin/node/undrain?{}", query.trim_end_matches('&')), "");
    let (client, answer) = flow_client::order(&endpoints, &call).await?;
    let job = flow_client::follow(client, &endpoints, &answer, true).await?;
    flow_client::show(&job, args.json)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::http_client::parse_endpoints;

    #[test]
    fn a_node_is_named_unless_there_is_only_one() {
        let (one, two) = (parse_endpoints("a:1").unwrap(), parse_endpoints("a:1,b:1").unwrap());
        assert_eq!(query(None, &one).unwrap(), "");
        assert_eq!(query(Some("node 2"), &two).unwrap(), "node=node%202&");
        assert_eq!(query(None, &two).unwrap_err().exit_code(), 2);
    }
}
