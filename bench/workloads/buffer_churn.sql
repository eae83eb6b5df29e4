\set id random(1, 131032)
SELECT max(length(filler)) FROM pages WHERE id BETWEEN :id AND :id + 39;
