//! First contact, the pinned CA, and where the token goes.

mod support;

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    thread,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use serde_json::json;
use support::{Asked, Reply, Said, Scratch, serve_one, vmseal};

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), der }
    }

    fn fingerprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.der);
        digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
    }
}

struct TlsServer {
    url: String,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl TlsServer {
    /// Shows a certificate for `name` signed by `signer`, and `shown` as its CA.
    fn start(signer: &Ca, shown: &Ca, name: &str, listener: TcpListener) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &signer.issuer).unwrap().der().clone();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf, shown.der.clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        let config = Arc::new(config);
        let url = format!("https://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = log.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let connection = ServerConnection::new(config.clone()).unwrap();
                serve_one(&mut StreamOwned::new(connection, stream.unwrap()), &seen, &answer);
            }
        });
        Self { url, log }
    }

    fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }
}

fn answer(asked: &Asked, _: usize) -> Reply {
    match asked.what.as_str() {
        "POST /v1/login" => Reply::Json(json!({
            "token": "VMSEAL-TEST-TOKEN", "expires_ms": 1_795_510_212_000_i64, "name": "alice", "roles": ["Administrator"]
        })),
        "GET /v1/hosts" => Reply::Json(json!([])),
        "DELETE /v1/login" => Reply::Json(json!({})),
        _ => Reply::Problem(404, json!({ "status": 404, "title": "", "code": "not-found", "detail": "no" })),
    }
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn login(scratch: &Scratch, url: &str, more: &[&str]) -> Said {
    let password = scratch.write("password", "VMSEAL-TEST-PASSWORD\n");
    let mut args =
        vec!["login", "--server", url, "--user", "alice", "--password-file", password.to_str().unwrap()];
    args.extend(more);
    vmseal(scratch, &args)
}

#[test]
fn login_pins_the_ca_and_keeps_the_token_private() {
    let (scratch, ca) = (Scratch::new(), Ca::new());
    let server = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    let said = login(&scratch, &server.url, &["--ca-fingerprint", &ca.fingerprint()]);
    assert_eq!((said.exit, said.stdout.as_str()), (0, ""), "{said:?}");
    assert!(said.stderr.contains("as alice (Administrator)") && !said.stderr.contains("TOKEN"), "{said:?}");
    assert_eq!(server.asked()[0].json(), json!({ "name": "alice", "password": "VMSEAL-TEST-PASSWORD" }));

    let token = scratch.path(".config/vmseal/token");
    assert_eq!(fs::read_to_string(&token).unwrap(), "VMSEAL-TEST-TOKEN");
    assert_eq!(fs::metadata(&token).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!fs::read_to_string(scratch.path(".config/vmseal/client.toml")).unwrap().contains("TOKEN"));

    let said = vmseal(&scratch, &["host", "list"]);
    assert_eq!((said.exit, said.stderr.as_str()), (0, ""), "{said:?}");
    assert_eq!(server.asked().last().unwrap().header("authorization"), Some("Bearer VMSEAL-TEST-TOKEN"));

    // A second login needs neither address nor fingerprint, and nobody to ask.
    let password = scratch.path("password");
    let said = vmseal(&scratch, &["login", "--password-file", password.to_str().unwrap()]);
    assert_eq!(said.exit, 0, "{said:?}");

    let said = vmseal(&scratch, &["logout"]);
    assert_eq!((said.exit, said.stderr.as_str()), (0, ""), "{said:?}");
    assert_eq!(server.asked().last().unwrap().what, "DELETE /v1/login");
    assert!(!token.exists());
    let said = vmseal(&scratch, &["host", "list"]);
    assert_eq!(said.exit, 3);
    assert!(said.stderr.contains("[unauthenticated]\nhint: sign in: vmseal login --server"), "{said:?}");
}

#[test]
fn server_that_is_not_the_one_named_gets_nothing() {
    let (scratch, ca, other) = (Scratch::new(), Ca::new(), Ca::new());
    let server = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    let said = login(&scratch, &server.url, &["--ca-fingerprint", &other.fingerprint()]);
    assert_eq!(said.exit, 3, "{said:?}");
    assert!(said.stderr.contains("has another fingerprint"), "{said:?}");

    // The CA is the right one, but did not sign this server; or signed it for another name.
    for (signer, name) in [(&other, "vmseal-server"), (&ca, "hv1.example.org")] {
        let liar = TlsServer::start(signer, &ca, name, listen());
        let said = login(&scratch, &liar.url, &["--ca-fingerprint", &ca.fingerprint()]);
        assert_eq!(said.exit, 3, "{said:?}");
        assert!(said.stderr.contains("did not prove to be the server"), "{said:?}");
        assert!(liar.asked().is_empty());
    }
    assert!(server.asked().is_empty());
    assert!(!scratch.path(".config/vmseal").exists());
}

#[test]
fn first_contact_without_a_terminal_shows_the_fingerprint_and_ends() {
    let (scratch, ca) = (Scratch::new(), Ca::new());
    let server = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    let said = login(&scratch, &server.url, &[]);
    assert_eq!(said.exit, 2, "{said:?}");
    let shown = said.stderr.replace(':', "").to_lowercase();
    assert!(shown.contains(&ca.fingerprint()), "{said:?}");
    assert!(server.asked().is_empty());
}

#[test]
fn person_at_a_terminal_decides_about_an_unknown_server() {
    let (scratch, ca) = (Scratch::new(), Ca::new());
    let server = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    let password = scratch.write("password", "VMSEAL-TEST-PASSWORD\n");
    for (answer, exit, requests) in [("n\n", 3, 0), ("\n", 3, 0), ("y\n", 0, 1)] {
        let said = support::at_terminal(
            &scratch,
            &[
                "login",
                "--server",
                &server.url,
                "--user",
                "alice",
                "--password-file",
                password.to_str().unwrap(),
            ],
            answer,
        );
        assert_eq!(said.exit, exit, "{said:?}");
        let shown = said.stdout.replace(':', "").to_lowercase();
        assert!(
            shown.contains(&ca.fingerprint()) && said.stdout.contains("Is it the same? [y/N]"),
            "{said:?}"
        );
        assert_eq!(server.asked().len(), requests, "{said:?}");
    }
}

#[test]
fn server_with_another_ca_at_the_same_address_is_refused_and_gets_no_token() {
    let (scratch, ca, other) = (Scratch::new(), Ca::new(), Ca::new());
    let server = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    assert_eq!(login(&scratch, &server.url, &["--ca-fingerprint", &ca.fingerprint()]).exit, 0);

    let impostor = TlsServer::start(&other, &other, "vmseal-server", listen());
    let config = scratch.path(".config/vmseal/client.toml");
    let text = fs::read_to_string(&config).unwrap().replace(&server.url, &impostor.url);
    fs::write(&config, text).unwrap();
    for args in
        [&["host", "list"][..], &["login", "--password-file", scratch.path("password").to_str().unwrap()]]
    {
        let said = vmseal(&scratch, args);
        assert_eq!(said.exit, 3, "{said:?}");
        assert!(said.stderr.contains("[integrity]"), "{said:?}");
    }
    assert!(impostor.asked().is_empty());
}

#[test]
fn token_goes_to_no_other_server() {
    let (scratch, ca) = (Scratch::new(), Ca::new());
    let server = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    assert_eq!(login(&scratch, &server.url, &["--ca-fingerprint", &ca.fingerprint()]).exit, 0);
    let second = TlsServer::start(&ca, &ca, "vmseal-server", listen());
    let said = vmseal(&scratch, &["host", "list", "--server", &second.url]);
    assert_eq!(said.exit, 3);
    assert!(said.stderr.contains(&format!("vmseal login --server {}", second.url)), "{said:?}");
    assert!(second.asked().is_empty());
}
