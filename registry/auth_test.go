package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/hearth-serverless/hearth/registry"
)

// tokens is a token server and the rule that a registry checks requests by. A
// token is good until revoke is called.
type tokens struct {
	mu       sync.Mutex
	valid    int
	issued   int
	password string // "" lets everyone in
	broken   int    // so many answers fail before one succeeds
	silent   bool   // challenges do not say that a token was invalid
}

func (k *tokens) revoke() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.valid++
}

func (k *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.broken--; k.broken >= 0 {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	if k.password != "" && r.FormValue("password") != k.password && r.FormValue("refresh_token") != k.password {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	k.issued++
	fmt.Fprintf(w, `{"token":"t%d","access_token":"t%[1]d"}`, k.valid)
}

// refuse answers 401 unless r carries the token that is valid now.
func (k *tokens) refuse(w http.ResponseWriter, r *http.Request) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	got := r.Header.Get("Authorization")
	if got == fmt.Sprintf("Bearer t%d", k.valid) {
		return false
	}
	challenge := `Bearer realm="http://` + bucket + `/token",service="s",scope="repository:lib/app:pull"`
	if got != "" && !k.silent {
		challenge += `,error="invalid_token"`
	}
	w.Header().Set("WWW-Authenticate", challenge)
	w.WriteHeader(http.StatusUnauthorized)
	return true
}

func TestTokenExpiresInMidBlob(t *testing.T) {
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("silent=%v", silent), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := &tokens{silent: silent}
				o := newOrigin()
				l, want := o.addBlob(100_000)
				o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
					if n == 8 {
						k.revoke()
					}
					return k.refuse(w, r)
				}
				n := newFakeNet()
				defer n.serve(home, o)()
				defer n.serve(bucket, k)()
				c := newClient(t, n, registry.Config{})
				defer c.Close()
				got, err := readLayer(t.Context(), c, l)
				mustIs(t, err, nil)
				if !bytes.Equal(got, want) {
					t.Error("wrong bytes")
				}
				if k.issued != 2 {
					t.Errorf("%d tokens issued, want one before and one after", k.issued)
				}
			})
		})
	}
}

// A token server that fails for a moment fails nothing but that moment.
func TestTokenServerRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &tokens{broken: 3}
		o := newOrigin()
		l, want := o.addBlob(20_000)
		o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool { return k.refuse(w, r) }
		n := newFakeNet()
		defer n.serve(home, o)()
		defer n.serve(bucket, k)()
		c := newClient(t, n, registry.Config{})
		defer c.Close()
		got, err := readLayer(t.Context(), c, l)
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Error("wrong bytes")
		}
	})
}

func TestCredentials(t *testing.T) {
	basic := base64.StdEncoding.EncodeToString([]byte("alice:s3cret"))
	helpers := filepath.Dir(writeFile(t, "docker-credential-test", "#!/bin/sh\nread -r host\n"+
		`if [ "$host" = "`+home+`" ]; then echo '{"Username":"alice","Secret":"s3cret"}'; else echo "credentials not found in native keychain"; exit 1; fi`))
	if err := os.Chmod(filepath.Join(helpers, "docker-credential-test"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", helpers+":"+os.Getenv("PATH"))
	tests := []struct {
		name, config string
		want         error
	}{
		{"auth", `{"auths":{"` + home + `":{"auth":"` + basic + `"}}}`, nil},
		{"auth under a URL", `{"auths":{"http://` + home + `/v2/":{"auth":"` + basic + `"}}}`, nil},
		{"user and password", `{"auths":{"` + home + `":{"username":"alice","password":"s3cret"}}}`, nil},
		{"helper", `{"credHelpers":{"` + home + `":"test"}}`, nil},
		{"store", `{"credsStore":"test"}`, nil},
		{"wrong password", `{"auths":{"` + home + `":{"username":"alice","password":"guess"}}}`, registry.ErrUnauthorized},
		{"none", `{}`, registry.ErrUnauthorized},
		{"another host's", `{"auths":{"` + mirror + `":{"auth":"` + basic + `"}}}`, registry.ErrUnauthorized},
		{"helper that is a path", `{"credsStore":"../test"}`, registry.ErrUnauthorized},
	}
	for _, tt := range tests {
		for _, scheme := range []string{"Basic", "Bearer"} {
			t.Run(tt.name+" "+scheme, func(t *testing.T) {
				path := writeFile(t, "config.json", tt.config)
				synctest.Test(t, func(t *testing.T) {
					k := &tokens{password: "s3cret"}
					o := newOrigin()
					o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
						if scheme == "Bearer" {
							return k.refuse(w, r)
						}
						user, pass, _ := r.BasicAuth()
						if user == "alice" && pass == "s3cret" {
							return false
						}
						w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
						w.WriteHeader(http.StatusUnauthorized)
						return true
					}
					o.addImage(t, "1", nil)
					n := newFakeNet()
					defer n.serve(home, o)()
					defer n.serve(bucket, k)()
					c := newClient(t, n, registry.Config{DockerConfig: path})
					defer c.Close()
					_, err := c.Image(t.Context(), repo+":1", "")
					mustIs(t, err, tt.want)
					if err != nil && strings.Contains(err.Error(), "guess") {
						t.Errorf("the error quotes a secret: %v", err)
					}
				})
			})
		}
	}
}

func TestBrokenDockerConfig(t *testing.T) {
	for _, content := range []string{`{`, `{"auths":{"h":{"auth":"!"}}}`, `{"auths":{"h":{"auth":"bm9jb2xvbg=="}}}`} {
		if _, err := registry.New(registry.Config{DockerConfig: writeFile(t, "config.json", content)}); err == nil {
			t.Errorf("%s is accepted", content)
		}
	}
	if _, err := registry.New(registry.Config{DockerConfig: filepath.Join(t.TempDir(), "absent")}); err == nil {
		t.Error("a named config that does not exist is accepted")
	}
}

// The registry sends us to a signed URL that expires: each range gets a new one,
// the bucket never sees our credentials, and no secret is logged.
func TestRedirectToSignedURL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &tokens{}
		o, store := newOrigin(), newOrigin()
		l, want := store.addBlob(50_000)
		o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
			if k.refuse(w, r) {
				return true
			}
			q := url.Values{"X-Signature": {fmt.Sprintf("sig%d", n)}}
			http.Redirect(w, r, "http://user:hunter2@"+bucket+"/b/blobs/"+l.Digest.String()+"?"+q.Encode(), http.StatusTemporaryRedirect)
			return true
		}
		store.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
			switch n {
			case 2:
				w.WriteHeader(http.StatusForbidden) // expired
				return true
			case 4:
				panic(http.ErrAbortHandler)
			}
			return false
		}
		mux := http.NewServeMux()
		mux.Handle("/token", k)
		mux.Handle("/b/", store)
		var log bytes.Buffer
		n := newFakeNet()
		defer n.serve(home, o)()
		defer n.serve(bucket, mux)()
		c := newClient(t, n, registry.Config{Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		defer c.Close()
		got, err := readLayer(t.Context(), c, l)
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Error("wrong bytes")
		}
		for _, r := range store.seen() {
			if a := r.Header.Get("Authorization"); strings.Contains(a, "Bearer") {
				t.Errorf("the bucket was sent %q", a)
			}
			if r.Header.Get("Range") == "" {
				t.Error("the range was lost on the way")
			}
		}
		for _, secret := range []string{"sig", "hunter2", "Bearer", "t0"} {
			if strings.Contains(log.String(), secret) {
				t.Errorf("the log contains %q:\n%s", secret, log.String())
			}
		}
	})
}

// What a failed redirect leaves in an error is no secret either.
func TestErrorsHideSignedURLs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, _ := o.addBlob(100)
		o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
			http.Redirect(w, r, "http://user:hunter2@"+bucket+"/x?X-Signature=sig", http.StatusFound)
			return true
		}
		_, _, err := pull(t, o, l, registry.Config{}) // the bucket refuses connections
		if err == nil || strings.Contains(err.Error(), "sig") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got error %v", err)
		}
	})
}

func TestCredentialsForOthers(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.json")
	basic := base64.StdEncoding.EncodeToString([]byte("alice:s3cret"))
	text := `{"auths":{"registry.test:5000":{"auth":"` + basic + `"},"token.test":{"identitytoken":"t0ken"}}}`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := registry.New(registry.Config{DockerConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for ref, want := range map[string][2]string{
		"registry.test:5000/a/b:1": {"alice", "s3cret"},
		"token.test/a:1":           {"", "t0ken"},
		"other.test/a:1":           {"", ""},
	} {
		user, secret, err := c.Credentials(t.Context(), ref)
		if err != nil || user != want[0] || secret != want[1] {
			t.Errorf("%s: %q, %q, %v; want %q", ref, user, secret, err, want)
		}
	}
	if _, _, err := c.Credentials(t.Context(), "NOT A REF"); err == nil {
		t.Error("a reference that is none was taken")
	}
}

// Credentials that come with a pull are asked for when a registry wants some, with the repository that they are for, before
// docker's; those that come after a refusal count for the next request.
func TestKeychain(t *testing.T) {
	for _, refusal := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(http.StatusText(refusal), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := &tokens{}
				o := newOrigin()
				o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
					k.mu.Lock()
					secret := k.password
					k.mu.Unlock()
					if k.refuse(w, r) {
						return true
					}
					if secret == "" { // the token is for anyone, the image is not
						w.WriteHeader(refusal)
						return true
					}
					return false
				}
				o.addImage(t, "1", nil)
				n := newFakeNet()
				defer n.serve(home, o)()
				defer n.serve(bucket, k)()
				var known string
				c := newClient(t, n, registry.Config{
					DockerConfig: writeFile(t, "config.json", `{}`),
					Keychain: func(_ context.Context, ref, host string) (user, secret string, err error) {
						if ref != repo || host != home {
							t.Errorf("asked for %s at %s", ref, host)
						}
						if known == "" {
							return "", "", nil
						}
						return "alice", known, nil
					},
				})
				defer c.Close()
				_, err := c.Image(t.Context(), repo+":1", "")
				mustIs(t, err, registry.ErrUnauthorized)
				known = "s3cret"
				k.mu.Lock()
				k.password = "s3cret"
				k.mu.Unlock()
				_, err = c.Image(t.Context(), repo+":1", "")
				mustIs(t, err, nil)
				user, secret, err := c.Credentials(t.Context(), repo+":1")
				if user != "alice" || secret != "s3cret" || err != nil {
					t.Errorf("for others: %q, %q, %v", user, secret, err)
				}
			})
		})
	}
}

func TestKeychainFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		o.addImage(t, "1", nil)
		n := newFakeNet()
		defer n.serve(home, o)()
		broken := errors.New("keychain is broken")
		c := newClient(t, n, registry.Config{Keychain: func(context.Context, string, string) (string, string, error) { return "", "", broken }})
		defer c.Close()
		_, err := c.Image(t.Context(), repo+":1", "")
		mustIs(t, err, broken)
	})
}
