package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// pair is a bundle that can be used.
type pair struct {
	certificate tls.Certificate
	trusted     *x509.CertPool
}

// parse checks that a bundle is whole and valid now.
func (b Bundle) parse(now time.Time) (*pair, error) {
	authorities, err := parseCertificates(b.Authorities)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", AuthorityFile, err)
	}
	chain, err := parseCertificates(b.Certificate)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", CertificateFile, err)
	}
	keys, err := parseKeys(b.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", KeyFile, err)
	}
	p := &pair{certificate: tls.Certificate{PrivateKey: keys[0], Leaf: chain[0]}, trusted: x509.NewCertPool()}
	for _, c := range authorities {
		p.trusted.AddCert(c)
	}
	between := x509.NewCertPool()
	for n, c := range chain {
		p.certificate.Certificate = append(p.certificate.Certificate, c.Raw)
		if n > 0 {
			between.AddCert(c)
		}
	}
	if !keys[0].PublicKey.Equal(chain[0].PublicKey) {
		return nil, fmt.Errorf("%s is not the key of %s", KeyFile, CertificateFile)
	}
	use := x509.VerifyOptions{Roots: p.trusted, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	if _, err := chain[0].Verify(use); err != nil {
		return nil, fmt.Errorf("%s: %w", CertificateFile, err)
	}
	return p, nil
}

// Dir is TLS from a folder with ca.crt, tls.crt and tls.key. Before each handshake it looks whether they have changed, as the kubelet
// changes those of a Secret: all at once, by a link. What has changed and cannot be used is logged once, and the former is kept. TLS is of
// version 1.3, both sides have certificates, and no session is resumed: it would outlive the authority that was trusted when it began.
// Safe for concurrent use.
type Dir struct {
	path string
	log  *slog.Logger

	now     atomic.Pointer[pair]
	reading sync.Mutex // guards mark and bad. Nobody waits for it: while one reads, others take what there is.
	mark    string     // of the files that now is from
	bad     string     // of those that were logged
}

// OpenDir reads a folder. An error says what is wrong with it.
func OpenDir(path string, log *slog.Logger) (*Dir, error) {
	d := &Dir{path: path, log: log}
	mark, err := d.look()
	if err != nil {
		return nil, fmt.Errorf("certificates in %s: %w", path, err)
	}
	p, err := d.read()
	if err != nil {
		return nil, fmt.Errorf("certificates in %s: %w", path, err)
	}
	d.now.Store(p)
	d.mark = mark
	return d, nil
}

func (d *Dir) files() [3]string {
	return [...]string{filepath.Join(d.path, AuthorityFile), filepath.Join(d.path, CertificateFile), filepath.Join(d.path, KeyFile)}
}

// look gives what differs when a file does. With an error, that is what it says.
func (d *Dir) look() (string, error) {
	var mark strings.Builder
	for _, name := range d.files() {
		info, err := os.Stat(name)
		if err != nil {
			return err.Error(), err
		}
		_, _ = fmt.Fprint(&mark, info.Size(), info.ModTime().UnixNano())
		if s, ok := info.Sys().(*syscall.Stat_t); ok {
			_, _ = fmt.Fprint(&mark, s.Dev, s.Ino, s.Ctim)
		}
		mark.WriteByte('\n')
	}
	return mark.String(), nil
}

func (d *Dir) read() (*pair, error) {
	var got [3][]byte
	for n, name := range d.files() {
		data, err := readFile(name)
		if err != nil {
			return nil, err
		}
		got[n] = data
	}
	return Bundle{Authorities: got[0], Certificate: got[1], Key: got[2]}.parse(time.Now())
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	return data, errors.Join(err, f.Close())
}

// current is what the files say, or last said that can be used.
func (d *Dir) current() *pair {
	if d.reading.TryLock() {
		defer d.reading.Unlock()
		d.reload()
	}
	return d.now.Load()
}

func (d *Dir) reload() {
	mark, err := d.look()
	if mark == d.mark {
		return
	}
	var p *pair
	if err == nil {
		p, err = d.read()
	}
	if again, _ := d.look(); again != mark {
		return // they change just now: the next handshake sees them whole
	}
	if err == nil {
		d.now.Store(p)
		d.mark, d.bad = mark, ""
		d.log.Info("certificates have changed", "folder", d.path, "expires", p.certificate.Leaf.NotAfter)
		return
	}
	if mark != d.bad { // it is tried again each time: what is not valid yet will be
		d.bad = mark
		d.log.Error("changed certificates cannot be used; going on with the former", "folder", d.path, "err", err)
	}
}

// Server is the TLS of a server that lets in who has one of some identities.
func (d *Dir) Server(allowed ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			p := d.current()
			return &tls.Config{
				MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}, SessionTicketsDisabled: true,
				Certificates: []tls.Certificate{p.certificate}, ClientCAs: p.trusted, ClientAuth: tls.RequireAndVerifyClientCert,
				VerifyConnection: func(s tls.ConnectionState) error { return admit(s, allowed) },
			}, nil
		},
	}
}

func admit(s tls.ConnectionState, allowed []string) error {
	names := s.PeerCertificates[0].DNSNames
	for _, name := range names {
		if slices.Contains(allowed, name) {
			return nil
		}
	}
	return fmt.Errorf("a certificate of %.200q is not let in here, those of %q are", names, allowed)
}

// Client is the TLS, for one connection, of a client that talks to who has an identity.
func (d *Dir) Client(identity string, protocols ...string) *tls.Config {
	p := d.current()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: protocols, SessionTicketsDisabled: true, ServerName: identity,
		// Not Certificates, of which none is sent if the server asks for another authority: who has none to show is told less clearly why.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &p.certificate, nil },
		RootCAs:              p.trusted,
	}
}

// Expires is when the certificate does that is used.
func (d *Dir) Expires() time.Time { return d.current().certificate.Leaf.NotAfter }

// WriteDir makes a folder that OpenDir reads, or changes one, as the kubelet does: who reads it sees all of a bundle or nothing.
func WriteDir(path string, b Bundle) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write certificates to %s: %w", path, err)
		}
	}()
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	const current = "..data"
	link := filepath.Join(path, current)
	former, _ := os.Readlink(link)
	fresh, err := os.MkdirTemp(path, "..bundle-")
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{AuthorityFile: b.Authorities, CertificateFile: b.Certificate, KeyFile: b.Key} {
		if err := os.WriteFile(filepath.Join(fresh, name), data, 0o600); err != nil {
			return errors.Join(err, os.RemoveAll(fresh))
		}
		if err := os.Symlink(filepath.Join(current, name), filepath.Join(path, name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return errors.Join(err, os.RemoveAll(fresh))
		}
	}
	if err := os.Symlink(filepath.Base(fresh), fresh+".link"); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	if err := os.Rename(fresh+".link", link); err != nil {
		return errors.Join(err, os.Remove(fresh+".link"), os.RemoveAll(fresh))
	}
	if strings.HasPrefix(former, "..bundle-") && !strings.ContainsRune(former, filepath.Separator) {
		return os.RemoveAll(filepath.Join(path, former))
	}
	return nil
}
