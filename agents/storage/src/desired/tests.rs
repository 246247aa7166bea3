use serde_json::json;
use stackhand_runtime::agent::Held;
use uuid::Uuid;

use super::*;
use crate::testing::{attachment, held, snapshot, volume};

fn judge(before: &Desired, wanted: &Desired) -> Result<(), Refusal> {
    let changed = wanted
        .objects
        .iter()
        .filter(|(object, held)| before.objects.get(object) != Some(held))
        .map(|(&object, _)| object)
        .collect();
    let backends = BTreeSet::from(["default".to_owned(), "fast".to_owned()]);
    admit("here", &backends, &Wanted::new(before), &Wanted::new(wanted), &changed)
}

fn set(documents: &[Held]) -> Desired {
    let objects = documents.iter().map(|held| (held.document.object(), held.clone())).collect();
    Desired { objects, revision: 0 }
}

fn refusal(before: &[Held], wanted: &[Held]) -> Refusal {
    judge(&set(before), &set(wanted)).unwrap_err()
}

#[test]
fn a_volume_that_shrinks_is_refused_and_one_that_grows_is_not() {
    let of = |size| held(volume(1, json!({"size_gib": size})));
    let refused = refusal(&[of(2)], &[of(1)]);
    assert_eq!(refused.code, ErrorCode::BadRequest);
    assert_eq!(refused.field.as_deref(), Some("spec.size_gib"));
    assert_eq!(refused.message, "it has 2 GiB, and volumes only grow");
    judge(&set(&[of(2)]), &set(&[of(3)])).unwrap();
}

#[test]
fn an_unknown_backend_is_refused_with_the_known_ones() {
    let refused = refusal(&[], &[held(volume(1, json!({"backend": "lvm"})))]);
    assert_eq!(refused.message, "host here has no backend \"lvm\"; it has: default, fast");
    assert_eq!(refused.object, Some(VolumeId(Uuid::from_u128(1)).object()));
}

#[test]
fn a_volume_of_another_host_and_one_from_an_image_are_refused() {
    let elsewhere = refusal(&[], &[held(volume(1, json!({"host": "there"})))]);
    assert_eq!(elsewhere.field.as_deref(), Some("spec.host"));
    let image = refusal(&[], &[held(volume(1, json!({"source": {"image": Uuid::from_u128(9)}})))]);
    assert_eq!(image.field.as_deref(), Some("spec.image"), "nobody said what it is");
}

#[test]
fn a_circle_of_sources_is_refused_even_through_snapshots() {
    let documents = [
        held(volume(1, json!({"source": {"snapshot": Uuid::from_u128(20)}}))),
        held(snapshot(20, 2)),
        held(volume(2, json!({"source": {"volume": Uuid::from_u128(1)}}))),
    ];
    let refused = refusal(&[], &documents);
    assert!(refused.message.starts_with("it would be made from itself"), "{refused}");
}

#[test]
fn a_second_attachment_is_refused_unless_the_volume_is_for_many() {
    let first = held(attachment(31, 1, "here"));
    let second = held(attachment(30, 1, "there"));
    let single = held(volume(1, json!({})));
    let refused =
        refusal(&[single.clone(), first.clone()], &[single.clone(), first.clone(), second.clone()]);
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert_eq!(refused.object, Some(second.document.object()), "the new one is refused");
    assert!(refused.message.contains("attached to host here by Attachment/"), "{refused}");

    let mut going = first.clone();
    going.deleting = true;
    judge(&set(&[single.clone(), first.clone()]), &set(&[single, going, second.clone()])).unwrap();
    let many = held(volume(1, json!({"multiattach": true})));
    judge(&set(&[]), &set(&[many, first, second])).unwrap();
}
