package registry

import (
	"net/http"
	"net/url"
	"testing"
	"time"
)

func TestRedirectExpiry(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		name, cache, expires, query string
		want                        time.Duration
	}{
		{name: "nothing said", want: keepRedirect},
		{name: "no-store", cache: "private, No-Store", want: 0},
		{name: "no-cache", cache: "no-cache", want: 0},
		{name: "max-age", cache: "public, max-age=90", want: 90 * time.Second},
		{name: "max-age that is none", cache: "max-age=soon", want: 0},
		{name: "max-age beyond all", cache: "max-age=99999999999", want: 0},
		{name: "longer than we keep it", cache: "max-age=86400", want: keepRedirect},
		{name: "Expires", expires: "Sun, 01 Mar 2026 12:01:00 GMT", want: time.Minute},
		{name: "Expires that is none", expires: "0", want: 0},
		{name: "max-age before Expires", cache: "max-age=60", expires: "0", want: time.Minute},
		{name: "S3", query: "X-Amz-Date=20260301T115950Z&X-Amz-Expires=60", want: 50 * time.Second},
		{name: "S3 by a clock that is ahead", query: "X-Amz-Date=20260301T130000Z&X-Amz-Expires=60", want: time.Minute},
		{name: "S3 without date", query: "X-Amz-Expires=60", want: time.Minute},
		{name: "S3 long past", query: "X-Amz-Date=20200301T115950Z&X-Amz-Expires=60", want: 0},
		{name: "S3 of old", query: "Expires=1772366430", want: 30 * time.Second},
		{name: "Google", query: "X-Goog-Date=20260301T115950Z&X-Goog-Expires=20", want: 10 * time.Second},
		{name: "Azure", query: "se=2026-03-01T12%3A02%3A00Z", want: 2 * time.Minute},
		{name: "nonsense", query: "X-Amz-Expires=-1&Expires=x&se=y", want: keepRedirect},
		{name: "the first of many", cache: "max-age=30", query: "X-Amz-Expires=20&Expires=1772366430", want: 20 * time.Second},
	}
	for _, tt := range tests {
		q, err := url.ParseQuery(tt.query)
		if err != nil {
			t.Fatal(err)
		}
		h := http.Header{}
		if tt.cache != "" {
			h.Set("Cache-Control", tt.cache)
		}
		if tt.expires != "" {
			h.Set("Expires", tt.expires)
		}
		if got := redirectExpiry(h, q, now).Sub(now); got != tt.want {
			t.Errorf("%s: good for %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestRedirectsAreBounded(t *testing.T) {
	var r redirects
	now := time.Unix(0, 0)
	for i := range 3 * maxRedirects {
		u := &url.URL{Scheme: "https", Host: "bucket"}
		resp := &http.Response{Request: &http.Request{URL: u, Header: http.Header{}, Response: &http.Response{Header: http.Header{}}}}
		r.keep(time.Duration(i).String(), "home", resp, now)
		if len(r.at) > maxRedirects {
			t.Fatalf("%d are remembered", len(r.at))
		}
	}
}
