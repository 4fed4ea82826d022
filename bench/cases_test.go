package bench

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func names(t *testing.T, o Options) []string {
	t.Helper()
	cases, err := o.pullCases()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, c := range cases {
		out = append(out, c.String())
	}
	return out
}

func TestChosenCasesAreAllCombinations(t *testing.T) {
	got := names(t, Options{Images: []string{"fat", "go"}, Links: []string{"loopback", "capped"}})
	want := []string{"fat/gzip/loopback", "fat/gzip/capped", "go/gzip/loopback", "go/gzip/capped"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("cases (-want +got):\n%s", diff)
	}
	got = names(t, Options{Image: "registry.example:5000/team/shop@sha256:00", Encodings: []string{"zstd"}})
	if diff := cmp.Diff([]string{"image-shop/zstd/loopback"}, got); diff != "" {
		t.Errorf("cases of an image of another registry (-want +got):\n%s", diff)
	}
}

func TestUsualCases(t *testing.T) {
	all := names(t, Options{})
	for _, want := range []string{"python/gzip/loopback", "fat/gzip/capped", "smallfiles/gzip/loopback", "java/siblings/loopback"} {
		if !slices.Contains(all, want) {
			t.Errorf("%s is not among the usual cases %q", want, all)
		}
	}
	if quick := names(t, Options{Quick: true}); quick[0] != "python/gzip/loopback" {
		t.Errorf("a quick run begins with %s", quick[0])
	}
}

func TestUnknownChoicesAreRefused(t *testing.T) {
	for word, o := range map[string]Options{
		"windows": {Images: []string{"windows"}}, "lzma": {Encodings: []string{"lzma"}}, "modem": {Links: []string{"modem"}},
	} {
		if _, err := o.pullCases(); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: error %v", word, err)
		}
	}
}
