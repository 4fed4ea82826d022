package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// authority signs certificates of one cluster.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// keyPair is a certificate and its key, in PEM.
type keyPair struct{ cert, key []byte }

// certTime is how long certificates hold: longer than any cluster that is made for a test.
const certTime = 365 * 24 * time.Hour

func newAuthority(name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificate(pkix.Name{CommonName: name})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key}, err
}

// certificate has a random serial number and begins a little ago, for clocks that differ.
func certificate(subject pkix.Name) *x509.Certificate {
	serial := make([]byte, 16)
	_, _ = rand.Read(serial)
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), Subject: subject,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certTime),
	}
}

// issue makes a certificate for a client, and for a server at the given names and addresses if there are any.
func (a *authority) issue(subject pkix.Name, names []string, addresses ...netip.Addr) (keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	template := certificate(subject)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if len(names)+len(addresses) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	template.DNSNames = names
	for _, ip := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return keyPair{}, fmt.Errorf("issue certificate for %s: %w", subject, err)
	}
	pemKey, err := encodeKey(key)
	return keyPair{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pemKey}, err
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// encodePublic is the public half, with which tokens of service accounts are checked.
func encodePublic(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// write puts a pair where programs read it.
func (p keyPair) write(dir, name string) error {
	if err := writeFile(filepath.Join(dir, name+".crt"), p.cert); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, name+".key"), p.key)
}

// kubeconfig says how to reach the API server at address as who the pair is for. JSON is YAML too.
func kubeconfig(address string, ca []byte, user string, p keyPair) ([]byte, error) {
	type named map[string]any
	return json.MarshalIndent(named{
		"apiVersion": "v1", "kind": "Config", "current-context": "hearth-test",
		"clusters": []named{{"name": "hearth-test", "cluster": named{"server": "https://" + address, "certificate-authority-data": ca}}},
		"users":    []named{{"name": user, "user": named{"client-certificate-data": p.cert, "client-key-data": p.key}}},
		"contexts": []named{{"name": "hearth-test", "context": named{"cluster": "hearth-test", "user": user}}},
	}, "", "  ")
}

// writeFile makes the folder too. What it writes is for root alone.
func writeFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}
