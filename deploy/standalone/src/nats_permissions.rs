//! `kvatlas nats-permissions`: what a broker must allow a role, for its configuration file.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use kvatlas_proto::permissions::{BusRole, Permissions};
use kvatlas_proto::subject::{DEFAULT_PREFIX, Subjects};
use kvatlas_proto::{DpRank, InstanceId};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output;

/// Arguments of `nats-permissions`.
#[derive(Args)]
pub struct PermissionsArgs {
    /// What the user is for.
    #[arg(long, value_enum)]
    role: Role,
    /// Instance whose shim this is, as its --engine names it; with --role shim.
    #[arg(long, value_name = "NAME", required_if_eq("role", "shim"))]
    instance: Option<String>,
    /// Data-parallel rank of the instance. Default: all ranks.
    #[arg(long, value_name = "N", requires = "instance")]
    rank: Option<u32>,
    /// Name of the deployment in NATS subjects.
    #[arg(long, env = "KVATLAS_SUBJECT_PREFIX", default_value = DEFAULT_PREFIX, value_name = "PREFIX")]
    subject_prefix: String,
    /// Print a whole user that logs in with this public nkey (U...), or the name of a variable that holds it ($NAME).
    #[arg(long, value_name = "NKEY")]
    nkey: Option<String>,
    /// Print a whole user with this name; needs --password-variable.
    #[arg(long, value_name = "NAME", conflicts_with = "nkey", requires = "password_variable")]
    user: Option<String>,
    /// Environment variable of the broker that holds the user's password, or its bcrypt hash.
    #[arg(long, value_name = "NAME", requires = "user")]
    password_variable: Option<String>,
    /// Print JSON instead of the broker's configuration language.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    /// A publisher shim.
    Shim,
    /// An index server.
    Index,
    /// Somebody who only listens to events.
    Observer,
}

/// Runs `nats-permissions`.
pub fn run(args: &PermissionsArgs) -> Result<ExitCode, Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::usage(error.to_string());
    let subjects = Subjects::new(&args.subject_prefix).map_err(|error| usage(&error))?;
    let role = match (args.role, &args.instance) {
        (Role::Shim, Some(name)) => {
            let instance = InstanceId::new(name.as_str()).map_err(|error| usage(&error))?;
            BusRole::Shim { instance, rank: args.rank.map(DpRank) }
        }
        (Role::Shim, None) => {
            return Err(Failure::usage("a shim speaks for one instance: add --instance NAME"));
        }
        (Role::Index | Role::Observer, Some(_)) => {
            return Err(Failure::usage("only a shim belongs to an instance: leave --instance away"));
        }
        (Role::Index, None) => BusRole::Index,
        (Role::Observer, None) => BusRole::Observer,
    };
    let permissions = subjects.permissions(&role);
    let login = login(args)?;
    if args.json {
        output::json(&as_json(&permissions, &login));
    } else {
        output::line(&as_conf(&permissions, &login));
    }
    Ok(ExitCode::SUCCESS)
}

/// Keys and values of a user's login, as the broker's configuration has them.
fn login(args: &PermissionsArgs) -> Result<Vec<(&'static str, String)>, Failure> {
    let variable = |name: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        (!name.is_empty() && name.bytes().all(plain))
            .then(|| format!("${name}"))
            .ok_or_else(|| Failure::usage(format!("{name:?} is not the name of an environment variable")))
    };
    if let Some(nkey) = &args.nkey {
        let value = match nkey.strip_prefix('$') {
            Some(name) => variable(name)?,
            None if nkey.starts_with('U') && nkey.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                nkey.clone()
            }
            // It may be a seed, which is a secret, so it is not shown.
            None => {
                return Err(Failure::usage(
                    "--nkey is a user's public key: it starts with U (a seed starts with SU)",
                ));
            }
        };
        return Ok(vec![("nkey", value)]);
    }
    match (&args.user, &args.password_variable) {
        (Some(user), Some(name)) => Ok(vec![("user", format!("{user:?}")), ("password", variable(name)?)]),
        _ => Ok(Vec::new()),
    }
}

fn as_json(permissions: &Permissions, login: &[(&'static str, String)]) -> Value {
    let permissions = json!({
        "publish": { "allow": permissions.publish },
        "subscribe": { "allow": permissions.subscribe },
    });
    if login.is_empty() {
        return json!({ "permissions": permissions });
    }
    let mut user = serde_json::Map::new();
    for (key, value) in login {
        user.insert((*key).to_owned(), Value::String(value.trim_matches('"').to_owned()));
    }
    user.insert("permissions".to_owned(), permissions);
    Value::Object(user)
}

fn as_conf(permissions: &Permissions, login: &[(&'static str, String)]) -> String {
    let mut out = String::new();
    let indent = if login.is_empty() { "" } else { "  " };
    let mut line = |text: &str| writeln!(out, "{text}").expect("writing to a string");
    if !login.is_empty() {
        line("{");
    }
    for (key, value) in login {
        line(&format!("{indent}{key}: {value}"));
    }
    line(&format!("{indent}permissions: {{"));
    for (name, subjects) in [("publish", &permissions.publish), ("subscribe", &permissions.subscribe)] {
        let subjects: Vec<String> = subjects.iter().map(|subject| format!("{subject:?}")).collect();
        line(&format!("{indent}  {name}: {{ allow: [{}] }}", subjects.join(", ")));
    }
    line(&format!("{indent}}}"));
    if !login.is_empty() {
        line("}");
    }
    out.trim_end().to_owned()
}
