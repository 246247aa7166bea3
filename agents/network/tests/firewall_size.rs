//! What changes cost on a host that has many ports and rules.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

/// Thousands of rules take a while to load.
mod slow {
    use std::collections::BTreeSet;
    use std::time::Instant;

    use serde_json::{Value, json};
    use stackhand_kernel::netlink::WriteCount;
    use stackhand_model::NetworkId;
    use stackhand_network::firewall::model::Surroundings;
    use stackhand_network::firewall::netlink::KernelFirewall;
    use stackhand_network::firewall::{Enforcer, Model};
    use stackhand_network::settings::Renderer;
    use uuid::Uuid;

    use crate::support::{Documents, on_a_host};

    /// The documents of `ports` ports, the last of which may have no group.
    fn put_port(documents: &mut Documents, net: Uuid, number: u16, groups: &[Uuid]) {
        let id = Uuid::from_u128(u128::from(number) << 96 | 7);
        let [high, low] = number.to_be_bytes();
        let spec = json!({
            "network": net, "host": "one", "mac": format!("fa:16:3e:00:{high:02x}:{low:02x}"),
            "fixed_ips": [{"subnet": "main", "address": format!("10.7.{high}.{low}")}],
            "security_groups": groups,
        });
        documents.put("Port", &format!("p{number}"), id, spec);
    }

    fn rules(group: u16) -> Value {
        let [high, low] = group.to_be_bytes();
        (0..400_u16)
            .map(|rule| {
                json!({
                    "direction": "ingress", "protocol": "tcp", "port_range_min": 1000 + rule,
                    "port_range_max": 1000 + rule, "remote_cidr": format!("{}.{high}.{low}.{}/32", 11 + rule / 200, rule % 200),
                })
            })
            .collect()
    }

    fn model(documents: &Documents, net: Uuid) -> Model {
        Model::new(
            &documents.desired(),
            Surroundings {
                host: "one",
                bridges: [(NetworkId(net), "brq0".to_owned())].into(),
                has_link: &|_| true,
                orphans: BTreeSet::new(),
                barred: BTreeSet::new(),
            },
        )
    }

    #[test]
    fn a_change_costs_its_own_elements_however_much_there_is_beside_it() {
        on_a_host(|| async {
            let net = Uuid::from_u128(1);
            let mut documents = Documents::default();
            let friends = Uuid::from_u128(2);
            documents.put(
                "SecurityGroup",
                "friends",
                friends,
                json!({"rules": [
                    {"direction": "ingress", "remote_group": friends},
                ]}),
            );
            // A group of 400 different rules for every hundred ports, and one for all of them.
            let groups: Vec<Uuid> = (0..10).map(|it| Uuid::from_u128(100 + it)).collect();
            for (number, group) in (0..).zip(&groups) {
                documents.put(
                    "SecurityGroup",
                    &format!("g{number}"),
                    *group,
                    json!({"rules": rules(number)}),
                );
            }
            for number in 0..2000_u16 {
                let group = groups[usize::from(number % 10)];
                put_port(&mut documents, net, number, &[friends, group]);
            }
            let writes = WriteCount::default();
            let host = KernelFirewall::open(writes.clone(), Renderer::Auto).unwrap();
            let tracking = host.probe().await.unwrap();
            let mut enforcer = Enforcer::new(host, tracking);
            let begin = Instant::now();
            enforcer.enforce(&model(&documents, net)).await.unwrap();
            eprintln!("2,000 ports, 10 groups of 400 rules, cold: {:?}", begin.elapsed());

            let before = writes.get();
            put_port(&mut documents, net, 2000, &[friends, groups[3]]);
            let begin = Instant::now();
            let wanted = model(&documents, net);
            let modelled = begin.elapsed();
            let done = enforcer.enforce(&wanted).await.unwrap();
            eprintln!(
                "one port more, which is a member more: {:?}, {modelled:?} of it for the model",
                begin.elapsed()
            );
            assert_eq!(writes.get() - before, 1, "one transaction: {:?}", done.changes);
            assert!(done.changes.len() <= 10, "{:?}", done.changes);

            let before = writes.get();
            put_port(&mut documents, net, 7, &[groups[7]]);
            let begin = Instant::now();
            let done = enforcer.enforce(&model(&documents, net)).await.unwrap();
            eprintln!(
                "a member leaves a group of 2,000: {:?}, {:?}",
                begin.elapsed(),
                done.changes
            );
            assert!(done.changes.iter().any(|(_, change)| change.contains("members-")));
            assert!(writes.get() - before <= 2 && done.changes.len() <= 12, "{:?}", done.changes);

            let before = writes.get();
            let many = (0..10_000_u32)
                .map(|rule| json!({
                    "direction": "ingress", "protocol": "tcp", "port_range_min": 1 + rule % 5000,
                    "port_range_max": 1 + rule % 5000,
                    "remote_cidr": format!("20.{}.{}.0/24", rule / 250, rule % 250),
                }))
                .collect::<Vec<Value>>();
            documents.put("SecurityGroup", "g5", groups[5], json!({"rules": many}));
            let begin = Instant::now();
            enforcer.enforce(&model(&documents, net)).await.unwrap();
            eprintln!("a group gets 10,000 rules: {:?}", begin.elapsed());
            assert_eq!(writes.get() - before, 1);
        });
    }
}
