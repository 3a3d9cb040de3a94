use super::*;

fn hex(token: &str) -> String {
    sha256(token.as_bytes()).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

fn table(text: &str) -> AuthTable {
    AuthTable::parse(text).unwrap()
}

/// One identity by token, one by certificate.
fn two() -> AuthTable {
    table(&format!(
        r#"
        [[identity]]
        name = "gateway-a"
        token-sha256 = ["{}", "{}"]
        tenants = ["a", ""]
        models = ["m"]
        rights = ["query", "observe"]

        [[identity]]
        name = "auditor"
        certificate = ["spiffe://x/auditor"]
        common-name = ["auditor"]
        tenants = "all"
        rights = ["dump"]
        "#,
        hex("token-a"),
        hex("token-a-next"),
    ))
}

fn with_token(token: &str) -> Result<Credential, UnknownCallerError> {
    Credential::new([format!("Bearer {token}").as_bytes()], Arc::default())
}

fn with_names(alternative: &[&str], common: &[&str]) -> Credential {
    let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let peer = PeerNames { alternative: own(alternative), common: own(common) };
    Credential::new([], Arc::new(peer)).unwrap()
}

fn who(table: &AuthTable, credential: &Credential) -> Result<String, UnknownCallerError> {
    table.identify(credential).map(|identity| identity.name.clone())
}

#[test]
fn a_credential_names_one_identity_or_nobody() {
    let table = two();
    for (credential, expected) in [
        (with_token("token-a").unwrap(), Ok("gateway-a")),
        (with_token("token-a-next").unwrap(), Ok("gateway-a")),
        (with_token("token-b").unwrap(), Err(UnknownCallerError::Token)),
        (with_names(&["spiffe://x/auditor"], &[]), Ok("auditor")),
        (with_names(&["other", "spiffe://x/auditor"], &["z"]), Ok("auditor")),
        (with_names(&[], &["auditor"]), Ok("auditor")),
        // A common name is not an alternative name, nor the other way round.
        (with_names(&["auditor"], &["spiffe://x/auditor"]), Err(UnknownCallerError::Certificate)),
        (Credential::default(), Err(UnknownCallerError::Missing)),
    ] {
        assert_eq!(who(&table, &credential), expected.map(str::to_owned));
    }
}

#[test]
fn a_wrong_token_is_refused_even_beside_a_known_certificate() {
    let peer = PeerNames { alternative: vec!["spiffe://x/auditor".to_owned()], common: Vec::new() };
    let credential = Credential::new([&b"Bearer wrong"[..]], Arc::new(peer)).unwrap();
    assert_eq!(who(&two(), &credential), Err(UnknownCallerError::Token));
}

#[test]
fn authorization_is_one_bearer_token() {
    let long = "x".repeat(MAX_TOKEN_BYTES + 1);
    for bad in
        ["", "token-a", "Basic abc", "Bearer ", "Bearer a b", "Bearer a\u{7f}", &format!("Bearer {long}")]
    {
        let credential = Credential::new([bad.as_bytes()], Arc::default());
        assert_eq!(credential.err(), Some(UnknownCallerError::Malformed), "{bad:?}");
    }
    let twice = Credential::new([&b"Bearer token-a"[..], b"Bearer token-a"], Arc::default());
    assert_eq!(twice.err(), Some(UnknownCallerError::Malformed));
    assert!(Credential::new([&b"bearer token-a"[..]], Arc::default()).is_ok());
}

#[test]
fn what_an_identity_may_is_the_product_of_rights_tenants_and_models() {
    let table = two();
    let a = table.identify(&with_token("token-a").unwrap()).unwrap();
    let auditor = table.identify(&with_names(&[], &["auditor"])).unwrap();
    for (identity, right, model, tenant, allowed) in [
        (&a, Right::Query, "m", "a", true),
        (&a, Right::Query, "m", "", true),
        (&a, Right::Observe, "m", "a", true),
        (&a, Right::Query, "m", "b", false),
        (&a, Right::Query, "other", "a", false),
        (&a, Right::Dump, "m", "a", false),
        (&a, Right::Report, "m", "a", false),
        (&auditor, Right::Dump, "any", "any", true),
        (&auditor, Right::Query, "any", "any", false),
    ] {
        let decision = identity.may(right, model, tenant);
        assert_eq!(decision.is_ok(), allowed, "{identity:?} {right:?} {model} {tenant}: {decision:?}");
    }
}

#[test]
fn a_refusal_names_the_identity_and_what_it_asked_for() {
    let a = two().identify(&with_token("token-a").unwrap()).unwrap();
    let tenant = a.may(Right::Query, "m", "b").unwrap_err().to_string();
    assert!(tenant.contains("gateway-a") && tenant.contains("\"b\""), "{tenant}");
    let model = a.may(Right::Query, "x", "a").unwrap_err().to_string();
    assert!(model.contains("gateway-a") && model.contains("\"x\""), "{model}");
    let right = a.may(Right::Dump, "m", "a").unwrap_err().to_string();
    assert!(right.contains("dump") && right.contains("query, observe"), "{right}");
    for text in [tenant, model, right, format!("{a:?}")] {
        assert!(!text.contains(&hex("token-a")) && !text.contains("token-a"), "{text}");
    }
}

#[test]
fn a_file_that_could_be_misread_is_refused_and_says_why() {
    let digest = hex("t");
    let entry = |name: &str, more: &str| {
        format!("[[identity]]\nname = \"{name}\"\ntenants = \"all\"\nrights = [\"query\"]\n{more}\n")
    };
    let token = format!("token-sha256 = [\"{digest}\"]");
    for (text, expected) in [
        (entry("a", ""), "no credential"),
        (entry("", &token), "identity 1"),
        (entry("a", &token) + &entry("a", "common-name = [\"x\"]"), "twice"),
        (entry("a", &token) + &entry("b", &token), "in common"),
        (entry("a", "token-sha256 = [\"hunter2\"]"), "64 hexadecimal"),
        (entry("a", "token-sha256 = 7"), "64 hexadecimal"),
        (entry("a", "token = \"hunter2\""), "token"),
        (entry("a", &token).replace("\"all\"", "\"a\""), "tenants"),
        (entry("a", &token).replace("[\"query\"]", "[]"), "no rights"),
        (entry("a", &token).replace("query", "admin"), "admin"),
        ("[[identity]]\nname = \"a\"".to_owned(), "tenants"),
    ] {
        let error = AuthTable::parse(&text).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains("hunter2"), "{text}: {error}");
    }
    // One digest may stand without a list around it, and nobody at all is a valid table.
    assert_eq!(table(&entry("a", &format!("token-sha256 = \"{digest}\""))).len(), 1);
    assert_eq!(table("").len(), 0);
}
