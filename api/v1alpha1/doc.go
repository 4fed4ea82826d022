// Package hearthv1 is the contract between Hearth's daemons, generated from api/hearth/v1alpha1: `make generate`.
package hearthv1
