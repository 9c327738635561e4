//! Reads everything below a concept from one node, for whoever compares it with what should be there.

use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::CliError;
use super::http_client::{Call, Client, encode_query};

/// Rows of one page; the API's maximum.
const PAGE_ROWS: usize = 1000;

/// Deadline of one page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct PageBody<T> {
    assertions: Vec<T>,
    cursor: Option<String>,
}

/// Hands over every fact of a concept or subtree, superseded ones too, in one linearizable listing, page by page.
/// `Unreachable` when the node does not answer, `Refused` when its answer is no page of `T`.
pub async fn each_fact<T: DeserializeOwned>(
    client: &mut Client,
    concept_path: &str,
    mut with: impl FnMut(T),
) -> Result<(), CliError> {
    let path = encode_query(concept_path);
    let authority = client.endpoint().authority().to_owned();
    let mut cursor: Option<String> = None;
    loop {
        let mut query = format!("/v1/query?concept_path={path}&resolve=all&limit={PAGE_ROWS}");
        if let Some(cursor) = &cursor {
            query.push_str("&cursor=");
            query.push_str(&encode_query(cursor));
        }
        let answer = client
            .call(&Call::get(query), PAGE_TIMEOUT)
            .await
            .map_err(|error| CliError::Unreachable(format!("{authority}: {error}")))?;
        if !answer.is_success() {
            return Err(CliError::Refused(format!("{authority}: {}", answer.describe())));
        }
        let page: PageBody<T> = answer.json().map_err(|error| CliError::Refused(format!("{authority}: {error}")))?;
        page.assertions.into_iter().for_each(&mut with);
        match page.cursor {
            Some(next) if cursor.as_ref() == Some(&next) => {
                return Err(CliError::Refused(format!("{authority}: the cursor does not move")));
            }
            Some(next) => cursor = Some(next),
            None => return Ok(()),
        }
    }
}
