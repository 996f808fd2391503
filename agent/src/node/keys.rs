//! Keys that sign and verify: PEM as OpenSSL and cosign write it, Ed25519 for both, ECDSA P-256 (cosign's default) for verifying.
//!
//! A private key is PKCS#8 without a passphrase, a public one SubjectPublicKeyInfo. Private bytes are zeroed when they go.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SecureRandom;
use ring::signature::{self, Ed25519KeyPair, KeyPair, UnparsedPublicKey, VerificationAlgorithm};
use zeroize::Zeroizing;

/// DER of an Ed25519 key in PKCS#8 (RFC 8410, section 7), up to its 32 bytes.
const PRIVATE_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// DER of an Ed25519 key in SubjectPublicKeyInfo (RFC 8410, section 4), up to its 32 bytes.
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
/// DER of a P-256 key in SubjectPublicKeyInfo (RFC 5480), up to its 65 bytes (an uncompressed point).
const P256_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3,
    1, 7, 3, 0x42, 0,
];
/// A key file is a few hundred bytes.
const MAX_FILE: u64 = 64 << 10;

/// What signs.
#[derive(Debug)]
pub(crate) struct SigningKey(Ed25519KeyPair);

/// What verifies.
#[derive(Clone)]
pub(crate) struct PublicKey {
    algorithm: &'static dyn VerificationAlgorithm,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("PublicKey").field(&STANDARD.encode(&self.bytes)).finish()
    }
}

impl SigningKey {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(&read(path)?).with_context(|| format!("cannot use {} as a private key", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        if text.contains("ENCRYPTED") {
            bail!("it is encrypted; `sluice key generate` makes one that is not, for a secret store to keep");
        }
        let der = Zeroizing::new(pem(text, "PRIVATE KEY")?);
        // Both versions of PKCS#8: OpenSSL writes no public key into it.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der);
        Ok(Self(pair.map_err(|error| anyhow::anyhow!("it is not an Ed25519 key in PKCS#8: {error}"))?))
    }

    /// The signature in base64.
    pub(crate) fn sign(&self, message: &[u8]) -> String {
        STANDARD.encode(self.0.sign(message))
    }
}

impl PublicKey {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(&read(path)?).with_context(|| format!("cannot use {} as a public key", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let der = pem(text, "PUBLIC KEY")?;
        let ed25519 = der.strip_prefix(&PUBLIC_PREFIX).filter(|key| key.len() == 32);
        let p256 = der.strip_prefix(&P256_PREFIX).filter(|key| key.len() == 65);
        match (ed25519, p256) {
            (Some(key), _) => Ok(Self { algorithm: &signature::ED25519, bytes: key.to_vec() }),
            (_, Some(key)) => Ok(Self { algorithm: &signature::ECDSA_P256_SHA256_ASN1, bytes: key.to_vec() }),
            _ => bail!("it is neither an Ed25519 nor a P-256 key"),
        }
    }

    /// Whether a signature, in base64, is this key's of a message.
    pub(crate) fn verifies(&self, message: &[u8], signature: &str) -> bool {
        let Ok(signature) = STANDARD.decode(signature) else { return false };
        UnparsedPublicKey::new(self.algorithm, &self.bytes).verify(message, &signature).is_ok()
    }
}

/// Makes a pair: `NAME.key`, for its owner's eyes only, and `NAME.pub`. Replaces nothing.
pub(crate) fn generate(name: &Path) -> Result<()> {
    let mut seed = Zeroizing::new([0; 32]);
    let failed = |_: ring::error::Unspecified| anyhow::anyhow!("the kernel gives no random bytes");
    ring::rand::SystemRandom::new().fill(&mut *seed).map_err(failed)?;
    let pair = Ed25519KeyPair::from_seed_unchecked(&*seed)
        .map_err(|error| anyhow::anyhow!("no key can be made: {error}"))?;
    let private = Zeroizing::new([&PRIVATE_PREFIX[..], &*seed].concat());
    let public = [&PUBLIC_PREFIX[..], pair.public_key().as_ref()].concat();
    write(&name.with_extension("key"), 0o600, &to_pem(&private, "PRIVATE KEY"))?;
    write(&name.with_extension("pub"), 0o644, &to_pem(&public, "PUBLIC KEY"))
}

fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn read(path: &Path) -> Result<Zeroizing<String>> {
    use std::io::Read;
    let mut text = Zeroizing::new(String::new());
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text)
}

fn pem(text: &str, label: &str) -> Result<Vec<u8>> {
    let begin = format!("-----BEGIN {label}-----");
    let (_, rest) = text.split_once(&begin).with_context(|| format!("it has no `{begin}`"))?;
    let (body, _) = rest.split_once("-----END").context("it has no end")?;
    let body: Zeroizing<String> =
        Zeroizing::new(body.chars().filter(|character| !character.is_whitespace()).collect());
    // The position alone: what is there may be secret.
    STANDARD.decode(body.as_bytes()).ok().context("it is not valid base64")
}

fn to_pem(der: &[u8], label: &str) -> Zeroizing<String> {
    let body = Zeroizing::new(STANDARD.encode(der));
    let mut out = Zeroizing::new(format!("-----BEGIN {label}-----\n"));
    for line in body.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    fn openssl(dir: &Path, arguments: &[&str]) {
        let output = Command::new("openssl").args(arguments).current_dir(dir).output().expect("openssl");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn a_pair_signs_and_verifies_and_openssl_agrees() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = dir.path().join("ours");
        generate(&name).expect("made");
        assert!(generate(&name).is_err(), "nothing is replaced");
        let private = name.with_extension("key");
        let mode = std::fs::metadata(&private).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let signed = SigningKey::read(&private).expect("read").sign(b"message");
        let public = PublicKey::read(&name.with_extension("pub")).expect("read");
        assert!(public.verifies(b"message", &signed));
        assert!(!public.verifies(b"massage", &signed) && !public.verifies(b"message", "AAAA"));
        std::fs::write(dir.path().join("signature"), STANDARD.decode(&signed).expect("base64"))
            .expect("written");
        std::fs::write(dir.path().join("message"), "message").expect("written");
        let verify =
            ["-verify", "-pubin", "-inkey", "ours.pub", "-rawin", "-in", "message", "-sigfile", "signature"];
        openssl(dir.path(), &[&["pkeyutl"][..], &verify].concat());
    }

    #[test]
    fn keys_of_openssl_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        openssl(dir.path(), &["genpkey", "-algorithm", "ed25519", "-out", "e.key"]);
        openssl(dir.path(), &["pkey", "-in", "e.key", "-pubout", "-out", "e.pub"]);
        let signed = SigningKey::read(&path("e.key")).expect("read").sign(b"m");
        assert!(PublicKey::read(&path("e.pub")).expect("read").verifies(b"m", &signed));
        openssl(dir.path(), &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "p.key"]);
        openssl(dir.path(), &["ec", "-in", "p.key", "-pubout", "-out", "p.pub"]);
        std::fs::write(path("m"), "m").expect("written");
        openssl(dir.path(), &["dgst", "-sha256", "-sign", "p.key", "-out", "s", "m"]);
        let signed = STANDARD.encode(std::fs::read(path("s")).expect("signed"));
        assert!(PublicKey::read(&path("p.pub")).expect("read").verifies(b"m", &signed));
    }

    #[test]
    fn what_is_no_key_is_told_without_its_bytes() {
        let secret = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n";
        for text in ["", "secret", secret, "-----BEGIN PRIVATE KEY-----\nsecret!\n-----END"] {
            let said = format!("{:#}", SigningKey::parse(text).expect_err("no key"));
            assert!(!said.contains("secret") && !said.contains("c2Vj"), "{said}");
            assert!(PublicKey::parse(text).is_err());
        }
        let encrypted = "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAAAA\n-----END";
        assert!(format!("{:#}", SigningKey::parse(encrypted).expect_err("encrypted")).contains("encrypted"));
    }
}
