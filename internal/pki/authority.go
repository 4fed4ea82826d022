package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

const (
	day = 24 * time.Hour
	// AuthorityLife and CertificateLife are how long each is valid. Either is renewed when two thirds of it are over.
	AuthorityLife   = 3650 * day
	CertificateLife = 30 * day
	// Skew is how far clocks may be apart: what is made is valid since so long ago.
	Skew = time.Hour
	// Spread is how long a new authority is trusted before it signs. Until then every daemon has to have heard of it: the kubelet takes
	// minutes to bring a changed Secret into a pod.
	Spread = day

	domain = "hearth.dev"
)

// Bundle is what one part needs to prove who it is, and to tell who others are: each in PEM.
type Bundle struct {
	Authorities []byte // that are trusted
	Certificate []byte
	Key         []byte
}

// Equal says whether two are the same.
func (b Bundle) Equal(other Bundle) bool {
	return bytes.Equal(b.Authorities, other.Authorities) && bytes.Equal(b.Certificate, other.Certificate) && bytes.Equal(b.Key, other.Key)
}

// authority may sign.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Authorities are those that are trusted, the newest first. For as long as one replaces another there are two: the new one is trusted from
// the first day, signs after Spread, and the old one goes when nothing is valid any more that it has signed. The zero value trusts nobody.
type Authorities struct{ all []authority }

func newAuthority(now time.Time) (authority, error) {
	key, serial, err := newKey()
	if err != nil {
		return authority{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: fmt.Sprintf("Hearth %x", serial)}, // so that no two have one name
		NotBefore:    now.Add(-Skew), NotAfter: now.Add(AuthorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{domain}, // it is good for nothing else
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return authority{}, fmt.Errorf("make an authority: %w", err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		return authority{}, fmt.Errorf("make an authority: %w", err)
	}
	return authority{made, key}, nil
}

func newKey() (*ecdsa.PrivateKey, *big.Int, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, fmt.Errorf("make a serial number: %w", err)
	}
	return key, serial, nil
}

// made is when it was.
func (a authority) made() time.Time { return a.certificate.NotBefore.Add(Skew) }

// ParseAuthorities reads what Encode wrote.
func ParseAuthorities(certificates, keys []byte) (Authorities, error) {
	all, err := parseCertificates(certificates)
	if err != nil {
		return Authorities{}, fmt.Errorf("authorities: %w", err)
	}
	secret, err := parseKeys(keys)
	if err != nil {
		return Authorities{}, fmt.Errorf("keys of authorities: %w", err)
	}
	if len(all) != len(secret) {
		return Authorities{}, fmt.Errorf("%d authorities and %d keys", len(all), len(secret))
	}
	var out Authorities
	for n, c := range all {
		if !c.IsCA || !secret[n].PublicKey.Equal(c.PublicKey) {
			return Authorities{}, fmt.Errorf("authority %d is none, or its key is another's", n+1)
		}
		out.all = append(out.all, authority{c, secret[n]})
	}
	slices.SortStableFunc(out.all, func(a, b authority) int { return b.made().Compare(a.made()) })
	return out, nil
}

// Encode gives certificates and keys in PEM, in the same order.
func (a Authorities) Encode() (certificates, keys []byte, err error) {
	for _, one := range a.all {
		key, err := encodeKey(one.key)
		if err != nil {
			return nil, nil, err
		}
		keys = append(keys, key...)
	}
	return a.trusted(), keys, nil
}

func (a Authorities) trusted() (certificates []byte) {
	for _, one := range a.all {
		certificates = append(certificates, encodeCertificate(one.certificate)...)
	}
	return certificates
}

// Renew gives what the authorities are to be now, and why they are to change, which is empty if they are not.
func (a Authorities) Renew(now time.Time) (renewed Authorities, why string, err error) {
	for n, one := range a.all {
		if now.After(one.certificate.NotAfter) || n > 0 && !now.Before(a.all[n-1].made().Add(Spread+CertificateLife)) {
			why = "nothing depends on the former authority any more"
			break // nor on those before it
		}
		renewed.all = append(renewed.all, one)
	}
	if len(renewed.all) > 0 && now.Before(renewed.all[0].made().Add(AuthorityLife*2/3)) {
		return renewed, why, nil
	}
	if why = "the authority is to be replaced in time"; len(renewed.all) == 0 {
		why = "there is no authority that is valid"
	}
	one, err := newAuthority(now)
	if err != nil {
		return Authorities{}, "", err
	}
	renewed.all = slices.Insert(renewed.all, 0, one)
	return renewed, why, nil
}

// signer is who signs now: the newest of whom all have heard.
func (a Authorities) signer(now time.Time) (authority, error) {
	if len(a.all) == 0 {
		return authority{}, errors.New("there is no authority")
	}
	for _, one := range a.all {
		if !now.Before(one.made().Add(Spread)) {
			return one, nil
		}
	}
	return a.all[len(a.all)-1], nil
}

// Issue makes a certificate for an identity.
func (a Authorities) Issue(now time.Time, identity string) (Bundle, error) {
	by, err := a.signer(now)
	if err != nil {
		return Bundle{}, err
	}
	key, serial, err := newKey()
	if err != nil {
		return Bundle{}, err
	}
	end := now.Add(CertificateLife)
	if end.After(by.certificate.NotAfter) {
		end = by.certificate.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: identity}, DNSNames: []string{identity},
		NotBefore: now.Add(-Skew), NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.certificate, key.Public(), by.key)
	if err != nil {
		return Bundle{}, fmt.Errorf("make a certificate of %s: %w", identity, err)
	}
	encoded, err := encodeKey(key)
	if err != nil {
		return Bundle{}, err
	}
	return Bundle{Authorities: a.trusted(), Certificate: encodeCertificate(&x509.Certificate{Raw: der}), Key: encoded}, nil
}

// Renew gives what an identity's bundle is to be now, and why it is to change, which is empty if it is not.
func (a Authorities) RenewBundle(now time.Time, identity string, b Bundle) (renewed Bundle, why string, err error) {
	if why = a.fault(now, identity, b); why != "" {
		renewed, err = a.Issue(now, identity)
		return renewed, why, err
	}
	if renewed = b; !bytes.Equal(b.Authorities, a.trusted()) {
		why, renewed.Authorities = "other authorities are trusted", a.trusted()
	}
	return renewed, why, nil
}

// fault says why a certificate is to be made anew.
func (a Authorities) fault(now time.Time, identity string, b Bundle) string {
	if len(b.Certificate) == 0 && len(b.Key) == 0 {
		return "there is none"
	}
	pair, err := b.parse(now)
	if err != nil {
		return err.Error()
	}
	leaf := pair.certificate.Leaf
	by, err := a.signer(now)
	switch {
	case err != nil:
		return err.Error()
	case !slices.Equal(leaf.DNSNames, []string{identity}):
		return "it is another's"
	case leaf.CheckSignatureFrom(by.certificate) != nil:
		return "another authority signs now"
	case !now.Before(leaf.NotAfter.Add(-(leaf.NotAfter.Sub(leaf.NotBefore.Add(Skew)) / 3))):
		return "it will expire"
	}
	return ""
}

// Expires is when a bundle's certificate does; an error says that it is not valid now.
func (b Bundle) Expires(now time.Time) (time.Time, error) {
	pair, err := b.parse(now)
	if err != nil {
		return time.Time{}, err
	}
	return pair.certificate.Leaf.NotAfter, nil
}
