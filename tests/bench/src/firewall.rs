//! What changes of the firewall cost on a host that has 1,000 filtered ports with 400 rules each, in a
//! group of 2,000: until the agent says that they are in force.

use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};
use stackhand_model::Document;
use uuid::Uuid;

use crate::network::{Host, address, document, milliseconds, on_hosts, port, port_id};
use crate::table::Row;

/// Ports of this host, and as many of another.
const PORTS: u128 = 1000;

/// Groups of 400 rules; each port is in one, and in the one of all.
const GROUPS: u128 = 10;

/// How often each change is measured; the middle one counts.
const TIMES: usize = 7;

const NET: Uuid = Uuid::from_u128(7 << 96);
const FRIENDS: Uuid = Uuid::from_u128(2);

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    on_hosts(changes).await
}

async fn changes() -> anyhow::Result<Vec<Row>> {
    let network = json!({
        "type": "local",
        "subnets": [{"name": "main", "cidr": "10.7.0.0/16", "dhcp": false}],
    });
    let friends = json!({"rules": [{"direction": "ingress", "remote_group": FRIENDS}]});
    let mut documents = vec![
        document("Network", "net", NET, &network)?,
        document("SecurityGroup", "friends", FRIENDS, &friends)?,
    ];
    for number in 0..GROUPS {
        documents.push(group_of(number, rules(number, 400))?);
    }
    for number in 0..2 * PORTS {
        documents.push(member(number, if number < PORTS { "one" } else { "two" })?);
    }
    let host = Host::new()?;
    let mut agent = host.start();
    host.ready().await?;
    let begun = Instant::now();
    host.apply(&documents).await?;
    let cold = begun.elapsed();

    let mut next = 2 * PORTS;
    let (mut ports, mut members) = (Vec::new(), Vec::new());
    for _ in 0..TIMES {
        ports.push(transaction(&host, member(next, "one")?, 0).await?);
        members.push(transaction(&host, member(next + 1, "two")?, 1).await?);
        next += 2;
    }
    let many = group_of(3, rules(3, 10_000))?;
    let begun = Instant::now();
    host.apply(&[many]).await?;
    let group = begun.elapsed();
    let left = host.client().plan(&[], &[]).await?;
    ensure!(left.steps.is_empty(), "{} things are left to do", left.steps.len());
    agent.kill();
    Ok(vec![
        Row::told("1,000 ports x 400 rules: cold apply until active", milliseconds(cold), "ms"),
        Row::at_most("1,000 ports x 400 rules: one more", middle(ports), "ms", 50.0),
        Row::at_most("2,000 ports in a group: a member more", middle(members), "ms", 20.0),
        Row::told("a group of 100 ports gets 10,000 rules", milliseconds(group), "ms"),
    ])
}

/// Milliseconds until a document is active; if `exactly` is given, it must take as many writes.
async fn transaction(host: &Host, document: Document, exactly: u64) -> anyhow::Result<f64> {
    let before = writes(host).await?;
    let begun = Instant::now();
    host.apply(&[document]).await?;
    let took = milliseconds(begun.elapsed());
    let writes = writes(host).await? - before;
    ensure!(exactly == 0 || writes == exactly, "it took {writes} writes, not {exactly}");
    Ok(took)
}

async fn writes(host: &Host) -> anyhow::Result<u64> {
    Ok(host.client().facts().await?["writes"].as_u64().unwrap_or_default())
}

fn middle(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn group(number: u128) -> Uuid {
    Uuid::from_u128(100 + number)
}

fn group_of(number: u128, rules: Vec<Value>) -> anyhow::Result<Document> {
    let mut value =
        document("SecurityGroup", &format!("g{number}"), group(number), &json!({"rules": []}))?
            .to_value();
    value["generation"] = json!(rules.len());
    value["spec"]["rules"] = Value::Array(rules);
    Ok(Document::from_value(&value)?)
}

fn rules(group: u128, count: u128) -> Vec<Value> {
    (0..count)
        .map(|rule| {
            let port = 1 + rule % 5000;
            json!({
                "direction": "ingress", "protocol": "tcp",
                "port_range_min": port, "port_range_max": port,
                "remote_cidr": format!("{}.{}.{}.0/24", 20 + group, rule / 250, rule % 250),
            })
        })
        .collect()
}

fn member(number: u128, on: &str) -> anyhow::Result<Document> {
    let mut spec = port(NET, number, on);
    spec["port_security"] = json!(true);
    spec["fixed_ips"] = json!([{"subnet": "main", "address": address(number + 1)}]);
    spec["security_groups"] = json!([FRIENDS, group(number % GROUPS)]);
    document("Port", &format!("p{number}"), port_id(number), &spec)
}
