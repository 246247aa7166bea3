use tempfile::TempDir;
use uuid::Uuid;

use super::*;

const ID: ImageId = ImageId(Uuid::from_u128(5));

fn cache() -> (TempDir, ImageCache) {
    let root = tempfile::tempdir().unwrap();
    let cache = ImageCache::new(&root.path().join("images"), 1 << 20);
    (root, cache)
}

fn spec(source: &Path, checksum: Option<&str>) -> ImageSpec {
    ImageSpec {
        source: source.display().to_string(),
        checksum: checksum.map(str::to_owned),
        format: ImageFormat::Raw,
        min_disk_gib: 0,
        kernel: None,
        ramdisk: None,
        command_line: None,
    }
}

fn file(root: &TempDir, contents: &[u8]) -> PathBuf {
    let path = root.path().join("source");
    fs::write(&path, contents).unwrap();
    path
}

/// SHA-256 of `abc`, from the standard's own example.
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
/// SHA-512 of the same.
const ABC_512: &str = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";

#[test]
fn a_fetched_image_has_its_contents_by_hash_and_survives_its_source() {
    let (root, cache) = cache();
    let source = file(&root, b"abc");
    for checksum in [None, Some(format!("sha256:{ABC}")), Some(format!("sha512:{ABC_512}"))] {
        let spec = spec(&source, checksum.as_deref());
        let image = cache.fetch(ID, &spec, &Progress::default()).unwrap();
        assert_eq!((image.contents.as_str(), image.bytes), (ABC, 3));
        assert!(image.is_of(&spec));
    }
    fs::remove_file(&source).unwrap();
    assert_eq!(fs::read(cache.path(ABC)).unwrap(), b"abc");
    let seen = cache.look().unwrap();
    assert_eq!(seen.images[&ID].virtual_bytes, 3);
    assert_eq!(seen.contents.len(), 1);

    cache.forget(ID).unwrap();
    cache.remove_contents(ABC).unwrap();
    assert_eq!(cache.look().unwrap(), CacheSeen::default());
}

#[test]
fn a_wrong_checksum_leaves_nothing() {
    let (root, cache) = cache();
    let spec = spec(&file(&root, b"abd"), Some(&format!("sha256:{ABC}")));
    let error = cache.fetch(ID, &spec, &Progress::default()).unwrap_err();
    assert!(matches!(error, FetchError::Checksum { .. }), "{error}");
    assert_eq!(cache.look().unwrap(), CacheSeen::default());
}

#[test]
fn what_is_no_file_or_too_large_is_refused_without_waiting() {
    let (root, cache) = cache();
    let pipe = root.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for source in [&pipe, Path::new("/dev/zero"), root.path()] {
        let error = cache.fetch(ID, &spec(source, None), &Progress::default()).unwrap_err();
        assert!(matches!(error, FetchError::NotAFile { .. }), "{error}");
    }
    let large = file(&root, &vec![1; (1 << 20) + 1]);
    let error = cache.fetch(ID, &spec(&large, None), &Progress::default()).unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
    let http = spec(Path::new("http://example.org/image"), None);
    let error = cache.fetch(ID, &http, &Progress::default()).unwrap_err();
    assert!(matches!(error, FetchError::UnsupportedSource { .. }), "{error}");
    let missing = cache.fetch(ID, &spec(Path::new("/none"), None), &Progress::default());
    assert_eq!(missing.unwrap_err().to_string(), "cannot open /none");
    assert_eq!(cache.look().unwrap(), CacheSeen::default());
}

#[test]
fn an_image_whose_contents_are_gone_is_not_there() {
    let (root, cache) = cache();
    let spec = spec(&file(&root, b"abc"), None);
    cache.fetch(ID, &spec, &Progress::default()).unwrap();
    fs::remove_file(cache.path(ABC)).unwrap();
    assert_eq!(cache.look().unwrap().images.len(), 0);
}
