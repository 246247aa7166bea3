//! What may replace what: the rules of generations, as pure code.

use std::collections::BTreeSet;
use std::sync::Arc;

use stackhand_model::{AgentKind, Document, ErrorCode, ObjectRef};

use crate::agent::{Desired, Held, Refusal};
use crate::api::Change;

/// A document that may be accepted, with the generation it gets.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) document: Arc<Document>,
    pub(crate) change: Change,
}

/// Judges the documents of one request against what is held: all may be accepted, or none.
///
/// Generation 0 stands for "the next one, if anything differs". Order does not matter: a request
/// names each object once.
pub(crate) fn judge(
    agent: AgentKind,
    desired: &Desired,
    documents: Vec<Document>,
) -> Result<Vec<Verdict>, Vec<Refusal>> {
    let mut seen = BTreeSet::new();
    let mut refusals = Vec::new();
    let mut verdicts = Vec::with_capacity(documents.len());
    for document in documents {
        let object = document.object();
        let verdict = check_kind(agent, object)
            .and_then(|()| match seen.insert(object) {
                true => Ok(()),
                false => Err(Refusal::new(
                    ErrorCode::BadRequest,
                    format!("{} is in the request twice; send it once", label(&document)),
                )
                .about(object)),
            })
            .and_then(|()| judge_one(desired.objects.get(&object), document));
        match verdict {
            Ok(verdict) => verdicts.push(verdict),
            Err(refusal) => refusals.push(refusal),
        }
    }
    if refusals.is_empty() { Ok(verdicts) } else { Err(refusals) }
}

/// Refuses kinds that another agent realises.
pub(crate) fn check_kind(agent: AgentKind, object: ObjectRef) -> Result<(), Refusal> {
    let theirs = object.kind.agent();
    if theirs == agent {
        return Ok(());
    }
    Err(Refusal::new(
        ErrorCode::BadRequest,
        format!("{object} is for the {theirs} agent and was sent to the {agent} agent"),
    )
    .about(object)
    .at("kind"))
}

fn judge_one(held: Option<&Held>, mut document: Document) -> Result<Verdict, Refusal> {
    let object = document.object();
    let accept = |document, change| Ok(Verdict { document: Arc::new(document), change });
    let refuse = |message: String| {
        Err(Refusal::new(ErrorCode::Conflict, message).about(object).at("generation"))
    };
    let Some(held) = held else {
        document.generation = document.generation.max(1);
        return accept(document, Change::Created);
    };
    if held.deleting {
        return Err(Refusal::new(
            ErrorCode::Conflict,
            format!(
                "{} is being deleted; wait until it is gone, then apply it again",
                label(&document)
            ),
        )
        .about(object));
    }
    let newest = held.document.generation;
    let differs = !same_content(&held.document, &document);
    match document.generation {
        0 if differs => match newest.checked_add(1) {
            Some(next) => {
                document.generation = next;
                accept(document, Change::Updated)
            }
            None => refuse(format!(
                "{} is held with the last generation there is; delete it and apply it anew",
                label(&document)
            )),
        },
        0 => Ok(Verdict { document: Arc::clone(&held.document), change: Change::Unchanged }),
        asked if asked < newest => refuse(format!(
            "{} is held with generation {newest}, which is newer than {asked}; look at what is \
             held, then decide",
            label(&document)
        )),
        asked if asked == newest && differs => refuse(format!(
            "{} is held with generation {newest} and other content; look at what is held, then \
             send generation {} or 0",
            label(&document),
            newest.saturating_add(1)
        )),
        asked if asked == newest => {
            Ok(Verdict { document: Arc::clone(&held.document), change: Change::Unchanged })
        }
        _newer => accept(document, Change::Updated),
    }
}

/// Whether two documents of one object wish for the same.
fn same_content(held: &Document, new: &Document) -> bool {
    let Document { id: _, name, generation: _, labels, spec } = new;
    held.name == *name && held.labels == *labels && held.spec == *spec
}

/// How people call the document's object.
fn label(document: &Document) -> String {
    format!("{} {} ({})", document.kind(), document.name, document.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::fixtures::{group, object, other_agents_document};

    fn held(documents: &[Document], deleting: bool) -> Desired {
        let objects = documents
            .iter()
            .map(|it| (it.object(), Held { document: Arc::new(it.clone()), deleting }))
            .collect();
        Desired { objects, revision: 1 }
    }

    fn one(desired: &Desired, document: Document) -> Result<(Change, u64), Refusal> {
        judge(AgentKind::Network, desired, vec![document])
            .map(|verdicts| (verdicts[0].change, verdicts[0].document.generation))
            .map_err(|mut refusals| refusals.remove(0))
    }

    #[test]
    fn generations_decide_what_replaces_what() {
        let desired = held(&[group(1, "a", 5)], false);
        let conflict = None;
        for (name, generation, expected) in [
            ("a", 0, Some((Change::Unchanged, 5))),
            ("b", 0, Some((Change::Updated, 6))),
            ("a", 4, conflict),
            ("b", 4, conflict),
            ("a", 5, Some((Change::Unchanged, 5))),
            ("b", 5, conflict),
            ("a", 6, Some((Change::Updated, 6))),
            ("b", 9, Some((Change::Updated, 9))),
        ] {
            let result = one(&desired, group(1, name, generation));
            match expected {
                Some(expected) => assert_eq!(result, Ok(expected), "{name} {generation}"),
                None => {
                    let refusal = result.unwrap_err();
                    assert_eq!(refusal.code, ErrorCode::Conflict);
                    assert_eq!(refusal.field.as_deref(), Some("generation"));
                    assert!(refusal.message.contains("generation 5"), "{refusal}");
                }
            }
        }
    }

    #[test]
    fn a_new_object_gets_generation_one_or_the_one_it_came_with() {
        let nothing = Desired::default();
        assert_eq!(one(&nothing, group(1, "a", 0)), Ok((Change::Created, 1)));
        assert_eq!(one(&nothing, group(1, "a", 7)), Ok((Change::Created, 7)));
    }

    #[test]
    fn an_object_that_is_being_deleted_takes_no_document() {
        let refusal = one(&held(&[group(1, "a", 5)], true), group(1, "a", 6)).unwrap_err();
        assert_eq!((refusal.code, refusal.object), (ErrorCode::Conflict, Some(object(1))));
        assert!(refusal.message.contains("wait until it is gone"), "{refusal}");
    }

    #[test]
    fn the_last_generation_cannot_be_passed() {
        let refusal = one(&held(&[group(1, "a", u64::MAX)], false), group(1, "b", 0)).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Conflict);
    }

    #[test]
    fn every_problem_of_a_request_is_told() {
        let request =
            vec![group(1, "a", 1), group(1, "a", 1), other_agents_document(2), group(3, "c", 1)];
        let desired = held(&[group(3, "c", 2)], false);
        let refusals = judge(AgentKind::Network, &desired, request).unwrap_err();
        let codes: Vec<_> = refusals.iter().map(|refusal| refusal.code).collect();
        assert_eq!(codes, [ErrorCode::BadRequest, ErrorCode::BadRequest, ErrorCode::Conflict]);
        assert!(refusals[0].message.contains("twice"), "{}", refusals[0]);
        assert!(refusals[1].message.contains("for the storage agent"), "{}", refusals[1]);
    }
}
