//! Certificates for servers on loopback, signed by their own authority: rustls accepts no
//! self-signed leaf.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::Result;

/// A set of certificates and keys, all in PEM.
pub struct Certificates {
    pub authority: String,
    pub certificate: String,
    pub key: String,
}

/// Makes a server's certificate for these names and addresses.
pub fn certificates(names: &[&str]) -> Result<Certificates> {
    let mut authority = CertificateParams::new(Vec::new())?;
    // OpenSSL takes a certificate whose subject is its issuer's for a self-signed one.
    let name = "warm-spare tests' authority";
    authority.distinguished_name.push(DnType::CommonName, name);
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names = names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
    Ok(Certificates {
        authority: authority.pem(),
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// Makes a certificate authority used as a server's certificate, as `openssl req -x509` does.
pub fn self_signed(names: &[&str]) -> Result<Certificates> {
    let key = KeyPair::generate()?;
    let names = names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut params = CertificateParams::new(names)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key)?.pem();
    Ok(Certificates {
        authority: certificate.clone(),
        certificate,
        key: key.serialize_pem(),
    })
}
