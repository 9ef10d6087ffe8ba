//! Keys by the `openssl` command, and tokens that no library would make.

use std::io::Write;
use std::process::{Command, Stdio};

use jsonwebtoken::{Algorithm, EncodingKey};

/// A key pair.
pub struct Pair {
    pub private: EncodingKey,
    pub private_pem: Vec<u8>,
    pub public_pem: Vec<u8>,
    /// One that its type allows.
    pub algorithm: Algorithm,
}

/// Runs `openssl` with `input` and returns its output.
pub fn run(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("openssl");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("these tests need the openssl command");
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A private key as `openssl genpkey` makes it.
pub fn pem(arguments: &[&str]) -> Vec<u8> {
    run(&[&["genpkey"], arguments].concat(), b"")
}

pub fn public_pem(private: &[u8]) -> Vec<u8> {
    run(&["pkey", "-pubout"], private)
}

pub fn rsa_pem(bits: u32) -> Vec<u8> {
    pem(&["-algorithm", "RSA", "-pkeyopt", &format!("rsa_keygen_bits:{bits}")])
}

pub fn ec_pem(curve: &str) -> Vec<u8> {
    pem(&["-algorithm", "EC", "-pkeyopt", &format!("ec_paramgen_curve:{curve}")])
}

fn pair(private_pem: Vec<u8>, private: EncodingKey, algorithm: Algorithm) -> Pair {
    let public_pem = public_pem(&private_pem);
    Pair { private, private_pem, public_pem, algorithm }
}

pub fn rsa(bits: u32) -> Pair {
    let pem = rsa_pem(bits);
    let key = EncodingKey::from_rsa_pem(&pem).unwrap();
    pair(pem, key, Algorithm::RS256)
}

pub fn ec(curve: &str) -> Pair {
    let pem = ec_pem(curve);
    let key = EncodingKey::from_ec_pem(&pem).unwrap();
    pair(pem, key, if curve == "P-256" { Algorithm::ES256 } else { Algorithm::ES384 })
}

pub fn ed25519() -> Pair {
    let pem = pem(&["-algorithm", "ed25519"]);
    let key = EncodingKey::from_ed_pem(&pem).unwrap();
    pair(pem, key, Algorithm::EdDSA)
}

/// An HS256 token whose payload is any text, signed as it should be.
pub fn token_of(payload: &str, key: &EncodingKey) -> String {
    // {"alg":"HS256"}
    let message = format!("eyJhbGciOiJIUzI1NiJ9.{}", base64url(payload.as_bytes()));
    let signature = super::sign(message.as_bytes(), key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

fn base64url(bytes: &[u8]) -> String {
    let text = String::from_utf8(run(&["base64", "-A"], bytes)).unwrap();
    text.trim_end_matches(['=', '\n']).replace('+', "-").replace('/', "_")
}
