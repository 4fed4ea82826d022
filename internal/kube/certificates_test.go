package kube_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-serverless/hearth/internal/kube"
	"github.com/hearth-serverless/hearth/internal/pki"
)

const (
	system = "hearth-system"
	day    = 24 * time.Hour
)

// secrets is an API server that has nothing else.
type secrets struct {
	client.Client
	log *syncBuffer
}

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

// take gives what was logged since it was last taken.
func (s *syncBuffer) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.b.Reset()
	return s.b.String()
}

func newSecrets(calls interceptor.Funcs) *secrets {
	return &secrets{fake.NewClientBuilder().WithInterceptorFuncs(calls).Build(), new(syncBuffer)}
}

func (s *secrets) keeper(dir string) *kube.Certificates {
	return kube.NewCertificates(kube.CertificatesConfig{
		Client: s.Client, Namespace: system, Dir: dir, Logger: slog.New(slog.NewTextHandler(s.log, nil)),
	})
}

func (s *secrets) get(t *testing.T, name string) *corev1.Secret {
	t.Helper()
	out := &corev1.Secret{}
	if err := s.Get(t.Context(), client.ObjectKey{Namespace: system, Name: name}, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *secrets) bundle(t *testing.T, name string) pki.Bundle {
	t.Helper()
	data := s.get(t, name).Data
	return pki.Bundle{Authorities: data["ca.crt"], Certificate: data["tls.crt"], Key: data["tls.key"]}
}

// change damages a Secret.
func (s *secrets) change(t *testing.T, name string, change func(data map[string][]byte)) {
	t.Helper()
	was := s.get(t, name)
	change(was.Data)
	if err := s.Update(t.Context(), was); err != nil {
		t.Fatal(err)
	}
}

func (s *secrets) remove(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := s.Delete(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: system, Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
}

var leaves = map[string]string{
	"hearth-tls-admin": pki.Admin, "hearth-tls-gateway": pki.Gateway, "hearth-tls-nodeagent": pki.Nodeagent, "hearth-tls-poolmanager": pki.Poolmanager,
}

// check is that all Secrets are there, and all daemons trust each other.
func (s *secrets) check(t *testing.T) {
	t.Helper()
	authority := s.get(t, kube.AuthoritySecret)
	a, err := pki.ParseAuthorities(authority.Data["ca.crt"], authority.Data["ca.key"])
	if err != nil {
		t.Fatal(err)
	}
	for name, identity := range leaves {
		if s.get(t, name).Type != corev1.SecretTypeTLS {
			t.Errorf("%s is of type %s", name, s.get(t, name).Type)
		}
		if _, why, err := a.RenewBundle(time.Now(), identity, s.bundle(t, name)); err != nil || why != "" {
			t.Errorf("%s: %s, %v", name, why, err)
		}
		if bytes.Contains(s.get(t, name).Data["ca.crt"], []byte("PRIVATE")) || len(s.get(t, name).Data) != 3 {
			t.Errorf("%s has more than it should", name)
		}
	}
}

func ensure(t *testing.T, k *kube.Certificates) {
	t.Helper()
	if err := k.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A cluster has nothing: all is made, once, and poolmanager's own is written where it is read.
func TestCertificatesAreMade(t *testing.T) {
	s := newSecrets(interceptor.Funcs{})
	dir := filepath.Join(t.TempDir(), "tls")
	k := s.keeper(dir)
	ensure(t, k)
	s.check(t)
	if lines := s.log.take(); strings.Count(lines, "made anew") != 5 || strings.Contains(lines, "PRIVATE") {
		t.Errorf("logged:\n%s", lines)
	}
	keys, err := pki.OpenDir(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	before := keys.Expires()
	s.remove(t, "hearth-tls-poolmanager", "hearth-tls-gateway")
	ensure(t, k)
	s.check(t)
	if keys.Expires().Before(before) {
		t.Error("the former is used")
	}
	s.log.take()
	versions := map[string]string{}
	for name := range leaves {
		versions[name] = s.get(t, name).ResourceVersion
	}
	ensure(t, s.keeper("")) // another replica finds nothing to do
	for name, version := range versions {
		if s.get(t, name).ResourceVersion != version {
			t.Errorf("%s was written for nothing", name)
		}
	}
	if lines := s.log.take(); lines != "" {
		t.Errorf("logged:\n%s", lines)
	}
}

// Replicas start at once. Whoever reads, all have read before any writes, as long as that is possible; then all come to the same.
func TestReplicasRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSecrets(interceptor.Funcs{
			Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
				err := c.Get(ctx, key, o, opts...)
				time.Sleep(time.Second)
				return err
			},
		})
		var replicas sync.WaitGroup
		for range 3 {
			k := s.keeper("")
			replicas.Go(func() {
				if err := k.Ensure(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		replicas.Wait()
		s.check(t)
		if n := strings.Count(s.log.take(), "made anew"); n != 5 {
			t.Errorf("%d were made", n)
		}
		time.Sleep(21 * day)
		for range 3 {
			k := s.keeper("")
			replicas.Go(func() {
				if err := k.Ensure(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		replicas.Wait()
		s.check(t)
		if n := strings.Count(s.log.take(), "will expire"); n != 4 {
			t.Errorf("%d were renewed", n)
		}
	})
}

// A replica reads that there is no authority just before another makes one, and then finds certificates of it: nothing was lost.
func TestReplicaThatReadsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newSecrets(interceptor.Funcs{})
		with := func(delay time.Duration) *secrets {
			return &secrets{interceptor.NewClient(store.Client.(client.WithWatch), interceptor.Funcs{
				Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
					err := c.Get(ctx, key, o, opts...)
					time.Sleep(delay)
					return err
				},
			}), store.log}
		}
		fast, slow := with(time.Millisecond).keeper(""), with(time.Second).keeper("")
		done := make(chan error)
		go func() { done <- slow.Ensure(t.Context()) }()
		time.Sleep(time.Second / 2)
		ensure(t, fast)
		if err := <-done; err != nil {
			t.Error(err)
		}
		store.check(t)
	})
}

// Years go by: what is there is always valid, with days to spare, and the authority is replaced without a moment in which daemons that
// have the Secrets of a while ago refuse those that have them of now.
func TestCertificatesAreRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSecrets(interceptor.Funcs{})
		k := s.keeper("")
		ensure(t, k)
		first := s.get(t, kube.AuthoritySecret).Data["ca.crt"]
		time.Sleep(pki.AuthorityLife * 2 / 3)
		ensure(t, k)
		if both := s.get(t, kube.AuthoritySecret).Data["ca.crt"]; !bytes.HasSuffix(both, first) || len(both) == len(first) {
			t.Error("the former authority is not trusted any more, or there is no other")
		}
		s.check(t)
		for range 40 {
			time.Sleep(day)
			ensure(t, k)
			s.check(t)
			for name := range leaves {
				end, err := s.bundle(t, name).Expires(time.Now())
				if err != nil || time.Until(end) < 9*day {
					t.Fatalf("%s expires %s, %v", name, end, err)
				}
			}
		}
		if now := s.get(t, kube.AuthoritySecret).Data["ca.crt"]; bytes.Contains(now, first) {
			t.Error("the former authority is trusted for ever")
		}
	})
}

// Secrets are damaged: they are made anew, and the log says why.
func TestDamagedSecretsAreReplaced(t *testing.T) {
	s := newSecrets(interceptor.Funcs{})
	k := s.keeper("")
	ensure(t, k)
	for name, c := range map[string]struct {
		change func(data map[string][]byte)
		want   string
	}{
		"cut off":   {func(d map[string][]byte) { d["tls.crt"] = d["tls.crt"][:100] }, "tls.crt"},
		"no key":    {func(d map[string][]byte) { delete(d, "tls.key") }, "tls.key"},
		"empty":     {func(d map[string][]byte) { clear(d) }, "there is none"},
		"noise":     {func(d map[string][]byte) { d["tls.key"] = []byte("secret noise") }, "tls.key"},
		"no trust":  {func(d map[string][]byte) { d["ca.crt"] = nil }, "ca.crt"},
		"another's": {func(d map[string][]byte) { maps.Copy(d, s.get(t, "hearth-tls-admin").Data) }, "another's"},
		"a stranger's": {func(d map[string][]byte) {
			other := newSecrets(interceptor.Funcs{})
			ensure(t, other.keeper(""))
			maps.Copy(d, other.get(t, "hearth-tls-gateway").Data)
		}, "another authority"},
	} {
		t.Run(name, func(t *testing.T) {
			s.log.take()
			s.change(t, "hearth-tls-gateway", c.change)
			ensure(t, k)
			s.check(t)
			if lines := s.log.take(); strings.Count(lines, "\n") != 1 || !strings.Contains(lines, c.want) || strings.Contains(lines, "noise") {
				t.Errorf("logged:\n%s", lines)
			}
		})
	}
}

// The authority is lost or damaged while certificates that it signed are in use: none takes its place. poolmanager itself goes on, and also
// starts. Once nothing is in use any more, all begins anew.
func TestAuthorityIsNotReplacedWhileItIsNeeded(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, s *secrets){
		"lost": func(t *testing.T, s *secrets) { s.remove(t, kube.AuthoritySecret) },
		"damaged": func(t *testing.T, s *secrets) {
			s.change(t, kube.AuthoritySecret, func(d map[string][]byte) { d["ca.key"] = []byte("x") })
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSecrets(interceptor.Funcs{})
				ensure(t, s.keeper(""))
				before := s.bundle(t, "hearth-tls-gateway")
				lose(t, s)
				s.log.take()
				dir := filepath.Join(t.TempDir(), "tls")
				k := s.keeper(dir)
				err := k.Ensure(t.Context())
				if err == nil || !strings.Contains(err.Error(), "restore it") || !strings.Contains(err.Error(), "delete secret hearth-ca hearth-tls-admin") {
					t.Fatalf("it said: %v", err)
				}
				if _, err := pki.OpenDir(dir, slog.New(slog.DiscardHandler)); err != nil {
					t.Errorf("poolmanager cannot start: %v", err)
				}
				if !s.bundle(t, "hearth-tls-gateway").Equal(before) {
					t.Error("a certificate was changed")
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- k.Run(ctx) }()
				time.Sleep(time.Hour)
				cancel()
				if err := <-done; err != nil || strings.Count(s.log.take(), "\n") != 1 {
					t.Errorf("it is said each time, or never: %v", err)
				}
				time.Sleep(31 * day)
				ensure(t, k)
				s.check(t)
			})
		})
	}
}

// The API server refuses, is away, or has others change what is read: it is an error that names the Secret, and the next look does it.
func TestAPIServerFails(t *testing.T) {
	var refuse error
	s := newSecrets(interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			if refuse != nil {
				return refuse
			}
			return c.Get(ctx, key, o, opts...)
		},
	})
	k := s.keeper("")
	secret := schema.GroupResource{Resource: "secrets"}
	for _, err := range []error{errors.New("connection refused"), apierrors.NewForbidden(secret, "x", errors.New("no"))} {
		refuse = err
		if got := k.Ensure(t.Context()); got == nil || !strings.Contains(got.Error(), "hearth-ca") || !errors.Is(got, err) {
			t.Errorf("%v", got)
		}
	}
	refuse = nil
	ensure(t, k)
	s.check(t)
	busy := newSecrets(interceptor.Funcs{
		Create: func(_ context.Context, _ client.WithWatch, o client.Object, _ ...client.CreateOption) error {
			return apierrors.NewAlreadyExists(secret, o.GetName())
		},
	})
	if err := busy.keeper("").Ensure(t.Context()); err == nil || !strings.Contains(err.Error(), "others change it") {
		t.Errorf("%v", err)
	}
}
