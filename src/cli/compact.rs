//! `stemedb compact [NODE]` makes the tree of one node anew; `stemedb stats` shows what the trees of all hold.

use clap::Args;

use super::http_client::{Call, Client, Endpoint};
use super::{CliError, EndpointArgs, flow_client, output};

/// Arguments of `stemedb compact`.
#[derive(Args, Debug, Clone)]
pub struct CompactArgs {
    /// Name of the node; default: the first endpoint that answers
    node: Option<String>,
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Rewrite the whole tree, not only what is due
    #[arg(long)]
    whole: bool,
    /// Wait for the end
    #[arg(long)]
    wait: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `stemedb stats`.
#[derive(Args, Debug, Clone)]
pub struct StatsArgs {
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `stemedb compact`.
pub async fn run(args: &CompactArgs) -> Result<(), CliError> {
    let node =
        args.node.as_ref().map_or_else(String::new, |node| format!("&node={}", super::http_client::encode_query(node)));
    let body = serde_json::json!({ "aggressive": args.whole }).to_string();
    let call = Call::post(format!("/v1/admin/compact?wait={}{node}", args.wait), body);
    let endpoints = args.endpoints.parse()?;
    let (client, answer) = flow_client::order(&endpoints, &call).await?;
    let job = flow_client::follow(client, &endpoints, &answer, args.wait).await?;
    flow_client::show(&job, args.json)
}

/// Runs `stemedb stats`: what each given node says of its tree.
pub async fn run_stats(args: &StatsArgs) -> Result<(), CliError> {
    let endpoints = args.endpoints.parse()?;
    let mut found = Vec::new();
    for endpoint in endpoints {
        let said = ask(&endpoint).await;
        found.push((endpoint.authority().to_owned(), said));
    }
    if found.iter().all(|(_, said)| said.is_err()) {
        let errors: Vec<String> = found.into_iter().filter_map(|(_, said)| said.err()).collect();
        return Err(CliError::Unreachable(errors.join("; ")));
    }
    if args.json {
        let nodes: serde_json::Map<String, serde_json::Value> = found
            .into_iter()
            .map(|(at, said)| (at, said.unwrap_or_else(|e| serde_json::json!({"error": e}))))
            .collect();
        return output::json(&nodes);
    }
    let mut table = output::table(["HTTP", "FILES", "BYTES", "TO COMPACT", "IN MEMORY", "FLUSHES", "COMPACTIONS"]);
    for (at, said) in &found {
        let number = |key: &str| {
            let value = said.as_ref().ok().and_then(|said| said.get(key)?.as_u64());
            value.map_or_else(|| "-".to_owned(), output::thousands)
        };
        table.add_row([
            at.clone(),
            number("sst_file_count"),
            number("total_bytes"),
            number("pending_compaction_bytes"),
            number("memtable_bytes"),
            number("flush_count"),
            number("compaction_count"),
        ]);
    }
    output::line(&table.to_string())?;
    for (_, said) in found {
        if let Err(error) = said {
            output::notice(&format!("not asked: {error}"));
        }
    }
    Ok(())
}

async fn ask(endpoint: &Endpoint) -> Result<serde_json::Value, String> {
    Client::new(endpoint.clone()).get_json("/v1/admin/storage/stats", flow_client::ASK_TIMEOUT).await
}
