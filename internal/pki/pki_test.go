package pki_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/pki"
)

const day = 24 * time.Hour

var origin = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// since gives authorities that were first made at a time.
func since(t testing.TB, now time.Time) pki.Authorities {
	t.Helper()
	a, why, err := pki.Authorities{}.Renew(now)
	if err != nil || !strings.Contains(why, "no authority") {
		t.Fatalf("%q, %v", why, err)
	}
	return a
}

func issue(t testing.TB, a pki.Authorities, now time.Time, identity string) pki.Bundle {
	t.Helper()
	b, err := a.Issue(now, identity)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func certificates(t testing.TB, data []byte) (all []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// trusts says whether one who has a bundle lets in one who has another.
func trusts(t testing.TB, b, other pki.Bundle, now time.Time) bool {
	t.Helper()
	roots := x509.NewCertPool()
	for _, c := range certificates(t, b.Authorities) {
		roots.AddCert(c)
	}
	_, err := certificates(t, other.Certificate)[0].Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil
}

func TestAuthorityIsGoodForHearthOnly(t *testing.T) {
	a := since(t, origin)
	good := issue(t, a, origin, pki.Gateway)
	if !trusts(t, good, good, origin) {
		t.Error("a certificate is not its own authority's")
	}
	if !trusts(t, good, good, origin.Add(-pki.Skew+time.Minute)) {
		t.Error("a clock that is behind does not take it")
	}
	if evil := issue(t, a, origin, "bank.example"); trusts(t, good, evil, origin) {
		t.Error("the authority is good for names that are not Hearth's")
	}
	if _, err := (pki.Authorities{}).Issue(origin, pki.Gateway); err == nil {
		t.Error("nobody has signed")
	}
}

func TestBundleIsRenewed(t *testing.T) {
	a := since(t, origin)
	mine, others := issue(t, a, origin, pki.Gateway), issue(t, a, origin, pki.Nodeagent)
	stranger := issue(t, since(t, origin), origin, pki.Gateway)
	mixed, halved, garbled := mine, mine, mine
	mixed.Key = others.Key
	halved.Key = nil
	garbled.Certificate = mine.Certificate[:len(mine.Certificate)/2]
	for _, c := range []struct {
		name   string
		after  time.Duration
		bundle pki.Bundle
		want   string
	}{
		{"fresh", 0, mine, ""},
		{"two thirds are not over", 20*day - time.Minute, mine, ""},
		{"two thirds are over", 20 * day, mine, "will expire"},
		{"expired", 31 * day, mine, "expired"},
		{"of a clock ahead", 0, issue(t, a, origin.Add(2*time.Hour), pki.Gateway), "is before"},
		{"none", 0, pki.Bundle{}, "there is none"},
		{"another's", 0, others, "another's"},
		{"another's key", 0, mixed, "is not the key"},
		{"no key", 0, halved, "tls.key: no PEM block"},
		{"cut off", 0, garbled, "tls.crt: no PEM block"},
		{"a stranger's", 0, stranger, "another authority"},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := origin.Add(c.after)
			got, why, err := a.RenewBundle(now, pki.Gateway, c.bundle)
			if err != nil || (why != "") != (c.want != "") || !strings.Contains(why, c.want) {
				t.Fatalf("%q, %v; want %q", why, err, c.want)
			}
			if same := bytes.Equal(got.Certificate, c.bundle.Certificate); same != (c.want == "") {
				t.Errorf("same certificate: %t", same)
			}
			if _, err := got.Expires(now); err != nil {
				t.Error(err)
			}
		})
	}
}

// A life of fifteen years, half a day at a time where something happens: at every moment everybody trusts everybody, also who has not heard of
// the last change for as long as Spread allows.
func TestAuthoritiesReplaceEachOther(t *testing.T) {
	var a pki.Authorities
	heard := map[string][]pki.Bundle{} // by identity: what was there at each of the last steps
	identities := []string{pki.Gateway, pki.Poolmanager}
	made, most := 0, 0
	var changed time.Time
	step := func(now time.Time) time.Duration {
		switch age := now.Sub(changed); {
		case age < 2*pki.Spread || age > pki.CertificateLife && age < pki.CertificateLife+2*pki.Spread:
			return pki.Spread / 2
		case age > 3*pki.CertificateLife && age < pki.AuthorityLife/2: // years of nothing new
			clear(heard)
			return pki.AuthorityLife*2/3 - 2*pki.CertificateLife - age
		}
		return pki.CertificateLife / 5
	}
	for now := origin; now.Before(origin.Add(pki.AuthorityLife * 3 / 2)); now = now.Add(step(now)) {
		renewed, why, err := a.Renew(now)
		if err != nil {
			t.Fatal(err)
		}
		if a = renewed; strings.Contains(why, "authority") {
			certs, keys, err := a.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if a, err = pki.ParseAuthorities(certs, keys); err != nil {
				t.Fatal(err)
			}
			made++
			changed = now
			most = max(most, len(certificates(t, certs)))
		}
		for _, id := range identities {
			var last pki.Bundle
			if n := len(heard[id]); n > 0 {
				last = heard[id][n-1]
			}
			b, _, err := a.RenewBundle(now, id, last)
			if err != nil {
				t.Fatal(err)
			}
			if heard[id] = append(heard[id], b); len(heard[id]) > 2 {
				heard[id] = heard[id][1:]
			}
		}
		for _, b := range heard[pki.Gateway] {
			for _, other := range heard[pki.Poolmanager] {
				if !trusts(t, b, other, now) || !trusts(t, other, b, now) {
					t.Fatalf("after %s they do not trust each other", now.Sub(origin))
				}
			}
		}
	}
	if made != 5 || most != 2 { // three are made and two forgotten
		t.Errorf("%d changes of authorities, %d at once", made, most)
	}
}

func TestParseAuthorities(t *testing.T) {
	a := since(t, origin)
	certs, keys, err := a.Encode()
	if err != nil {
		t.Fatal(err)
	}
	_, strange, err := since(t, origin).Encode()
	if err != nil {
		t.Fatal(err)
	}
	leaf := issue(t, a, origin, pki.Admin)
	for name, c := range map[string]struct {
		certs, keys []byte
		want        string
	}{
		"nothing":           {nil, nil, "no PEM block"},
		"no key":            {certs, nil, "no PEM block"},
		"another's key":     {certs, strange, "another's"},
		"too few keys":      {append(bytes.Clone(certs), certs...), keys, "2 authorities and 1 keys"},
		"no authority":      {leaf.Certificate, leaf.Key, "none"},
		"key and no cert":   {keys, keys, "PRIVATE KEY"},
		"too many":          {bytes.Repeat(certs, 17), keys, "over 16"},
		"too large":         {bytes.Repeat([]byte("x"), 1<<20), keys, "bytes"},
		"not a certificate": {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), keys, "certificate 1"},
		"not a key":         {certs, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret")}), "key 1"},
	} {
		if _, err := pki.ParseAuthorities(c.certs, c.keys); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	a := since(f, origin)
	certs, keys, err := a.Encode()
	if err != nil {
		f.Fatal(err)
	}
	leaf := issue(f, a, origin, pki.Gateway)
	f.Add(certs, keys, leaf.Certificate, leaf.Key)
	f.Add(leaf.Certificate, leaf.Key, certs, keys)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), keys, certs, keys)
	f.Fuzz(func(t *testing.T, certs, keys, certificate, key []byte) {
		if a, err := pki.ParseAuthorities(certs, keys); err == nil {
			certs, keys, err := a.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := pki.ParseAuthorities(certs, keys); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = pki.Bundle{Authorities: certs, Certificate: certificate, Key: key}.Expires(origin)
	})
}

func TestDir(t *testing.T) {
	now := time.Now()
	a := since(t, now)
	first, second := issue(t, a, now, pki.Gateway), issue(t, a, now, pki.Gateway)
	path := filepath.Join(t.TempDir(), "tls")
	log := new(bytes.Buffer)
	if _, err := pki.OpenDir(path, slog.New(slog.NewTextHandler(log, nil))); err == nil || !strings.Contains(err.Error(), path) {
		t.Fatalf("there is none: %v", err)
	}
	set := func(b pki.Bundle) {
		t.Helper()
		if err := pki.WriteDir(path, b); err != nil {
			t.Fatal(err)
		}
	}
	set(issue(t, a, now.Add(-40*day), pki.Gateway))
	if _, err := pki.OpenDir(path, slog.New(slog.NewTextHandler(log, nil))); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Fatalf("it has expired: %v", err)
	}
	set(first)
	d, err := pki.OpenDir(path, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	used := func() []byte {
		c, err := d.Client(pki.Nodeagent).GetClientCertificate(&tls.CertificateRequestInfo{})
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	}
	expect := func(b pki.Bundle, lines int) {
		t.Helper()
		for range 3 {
			if !bytes.Equal(used(), b.Certificate) {
				t.Error("it uses another")
			}
		}
		if n := strings.Count(log.String(), "\n"); n != lines {
			t.Errorf("%d lines:\n%s", n, log)
		}
	}
	expect(first, 0)
	set(second)
	expect(second, 1)
	bad := first
	bad.Key = second.Key
	set(bad)
	expect(second, 2)
	set(pki.Bundle{})
	expect(second, 3)
	if err := os.Remove(filepath.Join(path, "tls.key")); err != nil {
		t.Fatal(err)
	}
	expect(second, 4)
	set(first)
	expect(first, 5)
	left, err := filepath.Glob(filepath.Join(path, "..bundle-*"))
	if err != nil || len(left) != 1 {
		t.Errorf("left over: %v, %v", left, err)
	}
	for _, name := range []string{"ca.crt", "tls.key"} {
		if info, err := os.Stat(filepath.Join(path, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}
