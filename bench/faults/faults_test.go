package faults_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/bench/faults"
)

const digest, blobPath = "sha256:abc", "/v2/shop/blobs/sha256:abc"

// layer is what the honest registry has.
func layer() []byte {
	out := make([]byte, 1<<20)
	for i := range out {
		out[i] = byte(i / 7)
	}
	return out
}

// serve is a registry with a fault.
func serve(t *testing.T, name string) (*faults.Registry, string) {
	t.Helper()
	honest := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(layer()))
	}))
	t.Cleanup(honest.Close)
	var fault faults.Fault
	for _, f := range faults.All() {
		if f.Name == name {
			fault = f
		}
	}
	if fault.Name != name {
		t.Fatalf("there is no fault %q", name)
	}
	r := faults.New(strings.TrimPrefix(honest.URL, "http://"), map[string]int64{digest: int64(len(layer()))}, fault)
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	return r, server.URL
}

// answer of a request that was made once.
type answer struct {
	status int
	header http.Header
	body   []byte
	err    error // of the body
}

func get(t *testing.T, url string, header ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer res.Body.Close()
	a := answer{status: res.StatusCode, header: res.Header}
	a.body, a.err = io.ReadAll(res.Body)
	return a
}

// right says whether an answer is all of the layer.
func (a answer) right() bool { return a.err == nil && a.status == 200 && bytes.Equal(a.body, layer()) }

func TestNoFault(t *testing.T) {
	r, url := serve(t, "")
	if a := get(t, url+blobPath); !a.right() {
		t.Errorf("answer %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
	if a := get(t, url+blobPath, "Range", "bytes=10-19"); a.status != 206 || !bytes.Equal(a.body, layer()[10:20]) {
		t.Errorf("answer %d, %q", a.status, a.body)
	}
	if got, want := r.Sent(digest), int64(len(layer())+10); got != want {
		t.Errorf("%d bytes were counted, want %d", got, want)
	}
}

func TestServerErrorsPass(t *testing.T) {
	_, url := serve(t, "5xx")
	var statuses []int
	for range 4 {
		statuses = append(statuses, get(t, url+blobPath).status)
	}
	if !slices.Equal(statuses, []int{503, 500, 502, 200}) {
		t.Errorf("answers %v", statuses)
	}
	if a := get(t, url+"/v2/shop/manifests/1"); a.status != 200 {
		t.Errorf("a manifest is answered with %d", a.status)
	}
}

func TestTooManySaysHowLong(t *testing.T) {
	_, url := serve(t, "429")
	if a := get(t, url+blobPath); a.status != 429 || a.header.Get("Retry-After") != "2" {
		t.Errorf("answer %d, Retry-After %q", a.status, a.header.Get("Retry-After"))
	}
}

func TestRangeIgnored(t *testing.T) {
	_, url := serve(t, "range-ignored")
	if a := get(t, url+blobPath, "Range", "bytes=10-19"); !a.right() {
		t.Errorf("answer %d, %d bytes", a.status, len(a.body))
	}
}

func TestResetEndsAnswersEarly(t *testing.T) {
	_, url := serve(t, "reset")
	for range 4 {
		if a := get(t, url+blobPath); a.err == nil || len(a.body) >= len(layer()) {
			t.Errorf("answer %d, %d bytes, error %v", a.status, len(a.body), a.err)
		}
	}
	if a := get(t, url+blobPath); !a.right() {
		t.Errorf("answer %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
}

func TestStallSendsHalf(t *testing.T) {
	_, url := serve(t, "stall")
	res, err := http.Get(url + blobPath)
	if err != nil {
		t.Fatal(err)
	}
	half := make([]byte, len(layer())/2)
	if _, err := io.ReadFull(res.Body, half); err != nil || !bytes.Equal(half, layer()[:len(half)]) {
		t.Errorf("the first half is not what it should be: %v", err)
	}
	_ = res.Body.Close() // only that ends it
	if a := get(t, url+blobPath); !a.right() {
		t.Errorf("the second answer: %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
}

func TestTokenExpires(t *testing.T) {
	_, url := serve(t, "token-expires")
	a := get(t, url+blobPath)
	if a.status != 401 || !strings.Contains(a.header.Get("WWW-Authenticate"), url+"/token") {
		t.Fatalf("answer %d, %q", a.status, a.header)
	}
	token := func() string {
		var said struct{ Token string }
		if err := json.Unmarshal(get(t, url+"/token").body, &said); err != nil || said.Token == "" {
			t.Fatalf("no token: %v", err)
		}
		return "Bearer " + said.Token
	}
	first := token()
	for range 5 {
		if a := get(t, url+blobPath, "Authorization", first); !a.right() {
			t.Fatalf("answer %d, %v", a.status, a.err)
		}
	}
	if a := get(t, url+blobPath, "Authorization", first); a.status != 401 {
		t.Errorf("the token is good for ever: %d", a.status)
	}
	if a := get(t, url+blobPath, "Authorization", token()); !a.right() {
		t.Errorf("answer %d to a new token", a.status)
	}
}

func TestRedirectExpires(t *testing.T) {
	_, url := serve(t, "redirect-expires")
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Get(url + blobPath)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	signed := res.Header.Get("Location")
	for range 3 {
		if a := get(t, signed); !a.right() {
			t.Fatalf("answer %d of %s, %v", a.status, signed, a.err)
		}
	}
	if a := get(t, signed); a.status != 403 {
		t.Errorf("the signed URL is good for ever: %d", a.status)
	}
	if a := get(t, url+blobPath); !a.right() {
		t.Errorf("answer %d to a new redirect", a.status)
	}
}

func TestTruncatedKnowsNoMore(t *testing.T) {
	_, url := serve(t, "truncated")
	half := len(layer()) / 2
	if a := get(t, url+blobPath); a.status != 200 || a.err != nil || !bytes.Equal(a.body, layer()[:half]) {
		t.Errorf("answer %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
	a := get(t, url+blobPath, "Range", "bytes=524000-600000")
	if a.status != 206 || a.header.Get("Content-Range") != "bytes 524000-524287/524288" || !bytes.Equal(a.body, layer()[524000:half]) {
		t.Errorf("answer %d, %q", a.status, a.header.Get("Content-Range"))
	}
	if a := get(t, url+blobPath, "Range", "bytes=600000-600001"); a.status != 416 {
		t.Errorf("answer %d to a range beyond", a.status)
	}
}

func TestCorruptChangesOneByte(t *testing.T) {
	_, url := serve(t, "corrupt")
	half := len(layer()) / 2
	want := layer()
	want[half] ^= 1
	if a := get(t, url+blobPath); a.status != 200 || !bytes.Equal(a.body, want) {
		t.Errorf("answer %d, %d bytes", a.status, len(a.body))
	}
	if a := get(t, url+blobPath, "Range", "bytes=524280-524290"); a.status != 206 || !bytes.Equal(a.body, want[524280:524291]) {
		t.Errorf("answer %d, %v", a.status, a.body)
	}
	if a := get(t, url+blobPath, "Range", "bytes=0-9"); !bytes.Equal(a.body, want[:10]) {
		t.Errorf("a range that has not the byte is wrong too")
	}
}

func TestWrongLengthIsMoreThanComes(t *testing.T) {
	_, url := serve(t, "wrong-length")
	if a := get(t, url+blobPath); a.err == nil || !bytes.Equal(a.body, layer()) || a.header.Get("Content-Length") != "1049576" {
		t.Errorf("%d bytes, error %v, Content-Length %s", len(a.body), a.err, a.header.Get("Content-Length"))
	}
}
