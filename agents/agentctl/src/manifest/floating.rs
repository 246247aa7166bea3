//! Which port a floating IP leads to and which router translates it, where the manifest names the
//! external network and the instance instead.
//!
//! `network: ext1` is the external network, `instance: demo` stands for that instance's port. The
//! router is the one that joins the two.

use serde_json::Value;
use stackhand_model::{Kind, ObjectRef, Spec, id_from_name};
use uuid::Uuid;

use super::draft::{Draft, Drafts};
use super::held::Held;

/// Fills in routers and ports of floating IPs.
///
/// Problems are added to `problems`.
pub(crate) fn bind(drafts: &mut Drafts, held: &Held, cloud: &str, problems: &mut Vec<String>) {
    let objects: Vec<ObjectRef> =
        drafts.keys().filter(|object| object.kind == Kind::FloatingIp).copied().collect();
    for object in objects {
        let Some(draft) = drafts.get_mut(&object) else { continue };
        let named = |kind: Kind, field: Option<Value>| {
            let text = field?.as_str()?.to_owned();
            Some(text.parse().unwrap_or_else(|_| id_from_name(cloud, kind, &text)))
        };
        let external = named(Kind::Network, draft.take("network"));
        let instance = named(Kind::Instance, draft.take("instance"));
        let draft = draft.clone();
        let look = Look { drafts, held };
        let found = look.bind(&draft, external, instance);
        let Some(draft) = drafts.get_mut(&object) else { continue };
        match found {
            Ok((router, port)) => {
                draft.set("router", router.to_string());
                if let Some(port) = port {
                    draft.set("port", port.to_string());
                }
            }
            // Incomplete without a word about networks: reading it tells what is missing.
            Err(Some((field, problem))) => problems.push(draft.problem(field, problem)),
            Err(None) => {}
        }
    }
}

type Problem = (&'static str, String);

/// Objects as the manifest has them, else as they are held.
struct Look<'a> {
    drafts: &'a Drafts,
    held: &'a Held,
}

/// The ends of a router.
struct Router {
    id: Uuid,
    gateway: Option<Uuid>,
    interfaces: Vec<Uuid>,
}

impl Look<'_> {
    /// The router of a floating IP and its port, if it leads to one port.
    fn bind(
        &self,
        draft: &Draft,
        external: Option<Uuid>,
        instance: Option<Uuid>,
    ) -> Result<(Uuid, Option<Uuid>), Option<Problem>> {
        let router = draft.id("router");
        let fits = |found: &Router| match (router, external) {
            (Some(id), _) => found.id == id,
            (None, Some(network)) => {
                found.gateway.and_then(|port| self.network_of(port)) == Some(network)
            }
            (None, None) => found.gateway.is_some(),
        };
        let routers: Vec<Router> = self.routers().into_iter().filter(fits).collect();
        let joins = |router: &Router, port: Uuid| {
            let network = self.network_of(port);
            let mut ends = router.interfaces.iter();
            network.is_some() && ends.any(|end| self.network_of(*end) == network)
        };
        let ports = match (draft.id("port"), instance) {
            (Some(port), None) => vec![port],
            (None, Some(instance)) => {
                let ports = self.ports_of(instance);
                if ports.is_empty() {
                    let problem = "the instance is not known, or has no port".to_owned();
                    return Err(Some(("spec.instance", problem)));
                }
                ports
            }
            (Some(_), Some(_)) => {
                let problem = "cannot be given together with port".to_owned();
                return Err(Some(("spec.instance", problem)));
            }
            (None, None) => {
                return match (router, &routers[..]) {
                    (Some(router), _) => Ok((router, None)),
                    (None, [only]) => Ok((only.id, None)),
                    (None, _) if external.is_none() => Err(None),
                    (None, found) => Err(Some((
                        "spec.router",
                        format!("is needed: {} routers lead to the network", found.len()),
                    ))),
                };
            }
        };
        let joined = ports.iter().find_map(|port| {
            routers
                .iter()
                .find(|router| joins(router, *port))
                .map(|router| (router.id, Some(*port)))
        });
        match (joined, router) {
            (Some(found), _) => Ok(found),
            // Whether the router that is named fits is its agent's to judge.
            (None, Some(router)) => Ok((router, ports.first().copied())),
            (None, None) => Err(Some((
                "spec.router",
                "is needed: no router has an interface on the port's network and a gateway on \
                 the external network"
                    .to_owned(),
            ))),
        }
    }

    fn routers(&self) -> Vec<Router> {
        let mut found = Vec::new();
        for (object, draft) in self.drafts.iter().filter(|(it, _)| it.kind == Kind::Router) {
            let id = |value: &Value| value.as_str().and_then(|text| text.parse().ok());
            let gateway = draft.field("gateway").and_then(|gateway| id(&gateway["port"]));
            let interfaces = draft.items("interfaces").filter_map(id).collect();
            found.push(Router { id: object.id, gateway, interfaces });
        }
        for (id, document) in self.held.of_kind(Kind::Router) {
            let known = self.drafts.contains_key(&document.object());
            if let Spec::Router(router) = &document.spec
                && !known
            {
                let gateway = router.gateway.as_ref().map(|gateway| gateway.port.0);
                let interfaces = router.interfaces.iter().map(|port| port.0).collect();
                found.push(Router { id, gateway, interfaces });
            }
        }
        found
    }

    fn ports_of(&self, instance: Uuid) -> Vec<Uuid> {
        let object = ObjectRef { kind: Kind::Instance, id: instance };
        match self.drafts.get(&object) {
            Some(draft) => draft
                .items("ports")
                .filter_map(|item| item["port"].as_str().and_then(|id| id.parse().ok()))
                .collect(),
            None => match self.held.newest(object).map(|it| &it.spec) {
                Some(Spec::Instance(spec)) => spec.ports.iter().map(|it| it.port.0).collect(),
                _ => Vec::new(),
            },
        }
    }

    fn network_of(&self, port: Uuid) -> Option<Uuid> {
        network_of(port, self.drafts, self.held)
    }
}

/// The network that a port is on.
pub(crate) fn network_of(port: Uuid, drafts: &Drafts, held: &Held) -> Option<Uuid> {
    let port = ObjectRef { kind: Kind::Port, id: port };
    match drafts.get(&port) {
        Some(draft) => draft.id("network"),
        None => match &held.newest(port)?.spec {
            Spec::Port(spec) => Some(spec.network.0),
            _ => None,
        },
    }
}

/// The network that a router's gateway leads to.
pub(crate) fn external_network(router: Uuid, drafts: &Drafts, held: &Held) -> Option<Uuid> {
    let routers = Look { drafts, held }.routers();
    let router = routers.into_iter().find(|it| it.id == router)?;
    network_of(router.gateway?, drafts, held)
}
